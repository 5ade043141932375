// The few lines of a test framework that these tests need, so that g++ alone builds them.
#pragma once

#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
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

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline int& failures() {
  static int count = 0;
  return count;
}

inline void fail(const char* file, int line, const std::string& what) {
  if (++failures() <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace effkern::test

#define TEST(name)                                                     \
  static void name();                                                  \
  static const ::effkern::test::Register register_##name(#name, name); \
  static void name()

#define EXPECT(condition, ...)                                                                                \
  do {                                                                                                        \
    if (!(condition))                                                                                         \
      ::effkern::test::fail(__FILE__, __LINE__, ::effkern::test::text("not " #condition " ", ##__VA_ARGS__)); \
  } while (false)
