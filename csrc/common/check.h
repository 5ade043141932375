// Checks of arguments. A message starts with the Python exception it becomes ("ValueError: ...");
// effkern/ops/_registry.py turns it into that exception. Form: "op: argument must be ..., got ...".
#pragma once

#include <sstream>
#include <stdexcept>

namespace effkern {

template <class... Parts>
[[noreturn]] void fail(const char* kind, const Parts&... parts) {
  std::ostringstream text;
  text << kind << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace effkern

#define EFFKERN_CHECK_VALUE(condition, ...)                       \
  do {                                                            \
    if (!(condition)) ::effkern::fail("ValueError", __VA_ARGS__); \
  } while (false)
#define EFFKERN_CHECK_TYPE(condition, ...)                       \
  do {                                                           \
    if (!(condition)) ::effkern::fail("TypeError", __VA_ARGS__); \
  } while (false)
#define EFFKERN_CHECK_INDEX(condition, ...)                       \
  do {                                                            \
    if (!(condition)) ::effkern::fail("IndexError", __VA_ARGS__); \
  } while (false)
