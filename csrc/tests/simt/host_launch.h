// Launches of host code (csrc/common/cuda/launch.cuh) in the harness: the launch is over when the call returns, under a
// schedule of its own, and a fault of the kernel is a RuntimeError.
#pragma once

#include "../../common/check.h"
#include "launch.h"

namespace effkern::device {

inline uint32_t& next_seed() {
  static uint32_t seed = 0;
  return seed;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned grid, int threads, int shared, Stream,
            const Arguments&... arguments) {
  test::simt::Launch how{
      .grid = grid, .threads = threads, .shared = static_cast<size_t>(shared), .seed = next_seed()++};
  const test::simt::Report report = test::simt::run(how, [&] { kernel(arguments...); });
  if (!report.ok()) fail("RuntimeError", name, ": ", report.what);
}

// A small device: 2 multiprocessors that hold a block each, so that blocks walk.
inline unsigned processors(const char*) { return 2; }
inline int most_shared(const char*) { return 99 << 10; }
template <class... Parameters>
unsigned resident_blocks(const char*, void (*)(Parameters...), int, int) {
  return 2;
}

}  // namespace effkern::device
