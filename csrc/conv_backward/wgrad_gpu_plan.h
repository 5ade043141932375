// How the weight's gradient is cut, on the host: the tile and the slices, from shapes and alignment alone.
#pragma once

#include "../conv/conv_gpu_plan.h"
#include "backward_gpu.h"

namespace effkern::conv::gpu {

enum class WgradChoice { Large, Small, Unaligned };

struct WgradPlan {
  WgradChoice choice;
  int32_t tap_columns, columns;
  device::Slices slices;
};

// Needs all of the problem but columns, parts and slices. Slices make up for few tiles: about as many blocks as two a
// multiprocessor of a large device, none of fewer than eight stages.
template <class T>
WgradPlan wgrad_plan(const Wgrad<T>& p, int64_t pixels) {
  constexpr int64_t kPer = device::kPerChunk<T>, kDepth = 64 / static_cast<int64_t>(sizeof(T)), kBlocks = 264;
  const auto parts = [](int64_t size, int64_t by) { return (size + by - 1) / by; };
  WgradPlan plan{};
  plan.tap_columns = static_cast<int32_t>(parts(p.c_in, kPer) * kPer);
  plan.columns = plan.tap_columns * p.kernel.h * p.kernel.w;
  const bool chunks = detail::in_chunks(p.x.p, p.xs) && detail::in_chunks(p.gz.p, p.gs) &&
                      (p.groups == 1 || (p.c_in % kPer == 0 && p.c_out % kPer == 0));
  const int64_t tile_m = 128, tile_n = sizeof(T) == 2 ? 128 : 64;
  const int64_t most = std::max<int64_t>(1, pixels / (8 * kDepth));
  const int64_t large = parts(p.c_out, tile_m) * parts(plan.columns, tile_n) * p.groups;
  plan.choice = !chunks                                                            ? WgradChoice::Unaligned
                : p.c_out > 64 && plan.columns > 64 && large * most >= kBlocks / 2 ? WgradChoice::Large
                                                                                   : WgradChoice::Small;
  const int64_t tiles =
      plan.choice == WgradChoice::Large ? large : parts(p.c_out, 64) * parts(plan.columns, 64) * p.groups;
  plan.slices = device::slices_of(pixels, parts(kBlocks, std::max<int64_t>(1, tiles)), 8 * kDepth, kDepth);
  return plan;
}

}  // namespace effkern::conv::gpu
