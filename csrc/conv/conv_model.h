// What one launch of the GPU convolution costs, from shapes alone: the bytes its instructions move between global
// memory (caches included) and shared memory, and its tensor core instructions. The tests hold the harness's counters
// to it. The traffic a card's memory sees is less: what several tiles read comes from L2 (docs/gpu.md).
#pragma once

#include <cstdint>

#include "conv_gpu.h"

namespace effkern::conv::gpu {

struct Work {
  int64_t macs = 0, bytes_a = 0, bytes_b = 0, bytes_residual = 0, bytes_y = 0, mma = 0, tiles = 0;
};

// Output positions times taps that fall inside the map, along one axis.
inline int64_t taps_inside(int32_t out, int32_t in, int32_t kernel, int32_t stride, int32_t pad, int32_t dilation) {
  int64_t sum = 0;
  for (int32_t o = 0; o < out; ++o)
    for (int32_t k = 0; k < kernel; ++k) {
      const int64_t at = static_cast<int64_t>(o) * stride - pad + static_cast<int64_t>(k) * dilation;
      sum += at >= 0 && at < in;
    }
  return sum;
}

// For one part without zero_to.
template <class C>
Work work(const Problem<typename C::T>& p) {
  constexpr int64_t size = sizeof(typename C::T);
  const int64_t pixels = static_cast<int64_t>(p.out.h) * p.out.w, rows = p.whole.count * pixels;
  const int64_t taps = static_cast<int64_t>(p.kernel.h) * p.kernel.w, c_in = p.whole.c_in, c_out = p.whole.c_out;
  const int64_t down = (rows + C::kTileM - 1) / C::kTileM, across = (c_out + C::kTileN - 1) / C::kTileN;
  const int64_t inside = taps_inside(p.out.h, p.in.h, p.kernel.h, p.stride.h, p.pad.h, p.dilation.h) *
                         taps_inside(p.out.w, p.in.w, p.kernel.w, p.stride.w, p.pad.w, p.dilation.w);
  const int64_t steps = taps * ((c_in + C::kHalfDepth - 1) / C::kHalfDepth);
  Work all;
  all.tiles = down * across * p.groups;
  all.macs = rows * c_out * c_in * taps * p.groups;
  all.bytes_a = across * p.whole.count * inside * c_in * size * p.groups;
  all.bytes_b = down * c_out * taps * c_in * size * p.groups;
  all.bytes_y = rows * c_out * size * p.groups;
  all.bytes_residual = p.residual ? all.bytes_y : 0;
  if (C::kMath != Math::F32) all.mma = all.tiles * steps * 2 * (C::kTileM / 16) * (C::kTileN / 8);
  return all;
}

}  // namespace effkern::conv::gpu
