// Activations and their slopes in fp64, as references.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../conv/conv_gpu.h"

namespace effkern::test::simt {

using conv::gpu::Act;

inline double activated(double v, Act act) {
  switch (act) {
    case Act::Relu:
      return v < 0 ? 0 : v;
    case Act::Relu6:
      return v < 0 ? 0 : v > 6 ? 6 : v;
    case Act::Hardswish:
      return v * std::min(std::max(v + 3, 0.0), 6.0) / 6;
    case Act::Silu:
      return v / (1 + std::exp(-v));
    default:
      return v;
  }
}

inline double slope(double v, Act act) {
  const double gate = 1 / (1 + std::exp(-v));
  switch (act) {
    case Act::Relu:
      return v > 0;
    case Act::Relu6:
      return v > 0 && v < 6;
    case Act::Hardswish:
      return v < -3 ? 0 : v <= 3 ? v / 3 + 0.5 : 1;
    case Act::Silu:
      return gate * (1 + v * (1 - gate));
    default:
      return 1;
  }
}

}  // namespace effkern::test::simt
