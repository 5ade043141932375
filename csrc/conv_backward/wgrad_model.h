// What one launch of the weight's gradient costs, from shapes alone: the bytes its instructions move between global
// memory (caches included) and shared memory, and its tensor core instructions. The tests hold the harness's counters
// to it.
#pragma once

#include "../conv/conv_model.h"
#include "backward_gpu.h"

namespace effkern::conv::gpu {

struct WgradWork {
  int64_t bytes_gz = 0, bytes_x = 0, bytes_parts = 0, mma = 0;
};

template <class C>
WgradWork wgrad_work(const Wgrad<typename C::T>& p) {
  constexpr int64_t size = sizeof(typename C::T), products = C::kMath == Math::TF32 ? 8 : 16;
  const int64_t down = (p.c_out + C::kTileM - 1) / C::kTileM, across = (p.columns + C::kTileN - 1) / C::kTileN;
  const int64_t maps = p.slices.rows / (int64_t{p.out.h} * p.out.w);
  const int64_t inside = taps_inside(p.out.h, p.in.h, p.kernel.h, p.stride.h, p.pad.h, p.dilation.h) *
                         taps_inside(p.out.w, p.in.w, p.kernel.w, p.stride.w, p.pad.w, p.dilation.w);
  int64_t steps = 0;
  for (int32_t s = 0; s < p.slices.count; ++s)
    steps += (std::min(p.slices.slice, p.slices.rows - s * p.slices.slice) + C::kDepth - 1) / C::kDepth;
  WgradWork all;
  all.bytes_gz = across * p.slices.rows * p.c_out * p.groups * size;
  all.bytes_x = down * maps * inside * p.c_in * p.groups * size;
  all.bytes_parts = int64_t{p.slices.count} * p.groups * p.c_out * p.columns * 4;
  if (C::kMath != Math::F32)
    all.mma = down * across * p.groups * steps * (C::kDepth / products) * (C::kTileM / 16) * (C::kTileN / 8);
  return all;
}

}  // namespace effkern::conv::gpu
