// The few lines of a test framework that these tests need, so that g++ alone builds them.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace effkern::test {

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

// EFFKERN_TEST="name" compiles this test alone, without the kernels that the others are about.
#if defined(EFFKERN_TEST)
constexpr bool compiled(std::string_view name) { return name == EFFKERN_TEST; }
#else
constexpr bool compiled(std::string_view) { return true; }
#endif

// The test that runs.
inline const char*& current() {
  static const char* name = "";
  return name;
}

// EFFKERN_FIRST_FAILURE=1: the first failed check ends the program. For those who only ask whether there is one.
inline bool ends_at_first_failure() {
  static const bool ends = std::getenv("EFFKERN_FIRST_FAILURE") != nullptr;
  return ends;
}

inline void fail(const char* file, int line, const std::string& what) {
  if (++failures() <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  if (!ends_at_first_failure()) return;
  std::printf("FAILED %s\n", current());
  std::fflush(nullptr);
  std::_Exit(1);
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace effkern::test

// A test is a template, so that one that is left out instantiates nothing.
#define TEST(name)                                                                                  \
  template <class>                                                                                  \
  static void name();                                                                               \
  template <bool kCompiled>                                                                         \
  static bool add_##name() {                                                                        \
    if constexpr (kCompiled) ::effkern::test::tests().push_back({#name, name<void>});               \
    return kCompiled;                                                                               \
  }                                                                                                 \
  [[maybe_unused]] static const bool added_##name = add_##name<::effkern::test::compiled(#name)>(); \
  template <class>                                                                                  \
  static void name()

#define EXPECT(condition, ...)                                                                                \
  do {                                                                                                        \
    if (!(condition))                                                                                         \
      ::effkern::test::fail(__FILE__, __LINE__, ::effkern::test::text("not " #condition " ", ##__VA_ARGS__)); \
  } while (false)
