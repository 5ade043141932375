// How many multiply-adds this core does right now: the yardstick every benchmark reports next to its result.
#pragma once

#include <string>

namespace effkern::host {

// GFLOP/s of one thread doing nothing but independent float32 multiply-adds for about `seconds`, with the
// instructions of `isa` (scalar, avx2, avx512), which this CPU must have. Clock and neighbours move it.
double fma_peak(double seconds, const std::string& isa);

}  // namespace effkern::host
