// Runs every test linked in, or those whose name contains the first argument. --list: their names; --only NAME: one.
#include <cstring>
#include <exception>

#include "check.h"

int main(int argc, char** argv) {
  using namespace effkern::test;
  const bool list = argc == 2 && std::strcmp(argv[1], "--list") == 0;
  const char* const only = argc == 3 && std::strcmp(argv[1], "--only") == 0 ? argv[2] : nullptr;
  int run = 0;
  for (const Test& test : tests()) {
    if (list) std::printf("%s\n", test.name);
    if (list || (only != nullptr && std::strcmp(test.name, only) != 0)) continue;
    if (only == nullptr && argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = failures();
    current() = test.name;
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(test.name, 0, error.what());
    }
    std::printf("%-6s %s\n", failures() == before ? "ok" : "FAILED", test.name);
    std::fflush(stdout);
    ++run;
  }
  if (list) return 0;
  std::printf("%d tests, %d failed checks\n", run, failures());
  return failures() == 0 && run > 0 ? 0 : 1;
}
