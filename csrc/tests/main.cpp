// Runs every test linked in, or those whose name contains the first argument.
#include <cstring>
#include <exception>

#include "check.h"

int main(int argc, char** argv) {
  using namespace effkern::test;
  int run = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(test.name, 0, error.what());
    }
    std::printf("%-6s %s\n", failures() == before ? "ok" : "FAILED", test.name);
    std::fflush(stdout);
    ++run;
  }
  std::printf("%d tests, %d failed checks\n", run, failures());
  return failures() == 0 && run > 0 ? 0 : 1;
}
