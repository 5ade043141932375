// What one launch of the weight's gradient costs, from shapes alone: the bytes its instructions move between global
// memory (caches included) and shared memory, and its tensor core instructions. The tests hold the harness's counters
// to it.
#pragma once

#include <vector>

#include "../conv/conv_model.h"
#include "backward_gpu.h"

namespace effkern::conv::gpu {

struct WgradWork {
  int64_t bytes_gz = 0, bytes_x = 0, bytes_parts = 0, mma = 0;
};

// classes: of widths by sample; empty where there is one.
template <class C>
WgradWork wgrad_work(const Wgrad<typename C::T>& p, const std::vector<Part>& classes = {}) {
  constexpr int64_t size = sizeof(typename C::T), products = C::kMath == Math::TF32 ? 8 : 16;
  const int64_t down = (p.c_out + C::kTileM - 1) / C::kTileM, across = (p.columns + C::kTileN - 1) / C::kTileN;
  const int64_t maps = p.slices.rows / (int64_t{p.out.h} * p.out.w);
  const int64_t inside = taps_inside(p.out.h, p.in.h, p.kernel.h, p.stride.h, p.pad.h, p.dilation.h) *
                         taps_inside(p.out.w, p.in.w, p.kernel.w, p.stride.w, p.pad.w, p.dilation.w);
  const auto steps = [](const device::Slices& s) {
    int64_t sum = 0;
    for (int32_t i = 0; i < s.count; ++i)
      sum += (std::max(0, std::min(s.slice, s.rows - i * s.slice)) + C::kDepth - 1) / C::kDepth;
    return sum;
  };
  WgradWork all;
  all.bytes_gz = across * p.slices.rows * p.c_out * p.groups * size;
  all.bytes_x = down * maps * inside * p.c_in * p.groups * size;
  all.bytes_parts = int64_t{p.slices.count} * p.groups * p.c_out * p.columns * 4;
  int64_t of_rows = classes.empty() ? down * steps(p.slices) : 0;  // of all rows of tiles
  if (!classes.empty()) all.bytes_gz = all.bytes_x = 0;
  for (const Part& part : classes) {
    all.bytes_gz += across * part.count * p.out.h * p.out.w * part.c_out * size;
    all.bytes_x += (part.c_out + C::kTileM - 1) / C::kTileM * part.count * inside * part.c_in * size;
  }
  for (int64_t row = 0; !classes.empty() && row < down; ++row) {
    int32_t entries = 0;
    for (const Part& part : classes) entries += part.c_out > row * C::kTileM ? part.count : 0;
    of_rows += steps(device::slices_within(p.slices, entries * p.out.h * p.out.w, C::kDepth));
  }
  if (C::kMath != Math::F32)
    all.mma = across * p.groups * of_rows * (C::kDepth / products) * (C::kTileM / 16) * (C::kTileN / 8);
  return all;
}

}  // namespace effkern::conv::gpu
