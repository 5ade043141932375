// Says at the end of a test program how often it ran a kernel: for the line that closes the proof.
#include <cstdio>

#include "block.h"

namespace effkern::test::simt {
namespace {

struct AtEnd {
  ~AtEnd() {
    const auto runs = static_cast<unsigned long>(current_launch());
    if (runs > 0) std::printf("%lu kernel runs, each under a schedule of its own\n", runs);
  }
} at_end;

}  // namespace
}  // namespace effkern::test::simt
