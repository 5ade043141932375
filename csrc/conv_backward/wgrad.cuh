// Gradient of a convolution in its weight for sm_80 and later, as an implicit GEMM: rows are output channels, columns
// taps times input channels, K the output's pixels. A block sums one tile over one slice of the pixels; fold.cuh adds
// the slices in order, so nothing depends on the order in which blocks run. Stages of shared memory are filled by
// asynchronous copies, kStages - 1 blocks of pixels ahead, with one barrier a block.
//
// Traffic of a block: (kTileM + kTileN) elements a pixel in, kTileM * kTileN floats out.
#pragma once

#include <type_traits>

#include "wgrad_math.cuh"

namespace effkern::conv::gpu {

template <Math kMath_, class T_, int kTileM_, int kTileN_, int kWarpM_, int kWarpN_, int kStages_, int kBlocks_,
          bool kAligned_, bool kListed_>
struct WgradConfig {
  using T = T_;
  static constexpr Math kMath = kMath_;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kWarpN = kWarpN_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;     // that one multiprocessor is to hold, which bounds the registers
  static constexpr bool kAligned = kAligned_;  // 16-byte copies: base, strides and groups allow them
  static constexpr bool kListed = kListed_;    // takes lists of samples and widths by sample
  static constexpr int kThreads = kTileM / kWarpM * (kTileN / kWarpN) * 32;
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));  // pixels of a stage
  static constexpr int kRowA = kTileM * static_cast<int>(sizeof(T)), kRowB = kTileN * static_cast<int>(sizeof(T));
  static_assert(kRowA % 128 == 0 && kRowB % 128 == 0);  // rows begin at the first bank
  static constexpr int kStageBytes = kDepth * (kRowA + kRowB), kShared = kStages * kStageBytes;
  using Sums = std::conditional_t<kMath == Math::F32, WgradFmas<WgradConfig>, WgradTensorCore<WgradConfig>>;
};

template <Math kMath, class T, bool kListed = false>
using WgradLarge = std::conditional_t<sizeof(T) == 2, WgradConfig<kMath, T, 128, 128, 64, 64, 3, 2, true, kListed>,
                                      WgradConfig<kMath, T, 128, 64, 64, 32, 3, 2, true, kListed>>;
template <Math kMath, class T, bool kListed = false>
using WgradSmall = WgradConfig<kMath, T, 64, 64, 32, 32, 4, 3, true, kListed>;
template <Math kMath, class T, bool kListed = false>
using WgradUnaligned = WgradConfig<kMath, T, 64, 64, 32, 32, 2, 2, false, kListed>;

// Tiles of one slice.
template <class C>
EFFKERN_BOTH int32_t wgrad_tiles(const Wgrad<typename C::T>& p) {
  return (p.c_out + C::kTileM - 1) / C::kTileM * ((p.columns + C::kTileN - 1) / C::kTileN) * p.groups;
}

// The pixels that a tile whose first output is m sums. Those of lists are cut where they are counted, so that no block
// waits for others that have more.
template <class C>
__device__ __forceinline__ device::Slices pixels_of(const Wgrad<typename C::T>& p, int32_t m) {
  if constexpr (!C::kListed) return p.slices;
  int32_t entries = 0;
  if (p.classes) {
    const int32_t count = device::load<int32_t>(p.class_count);
    for (int32_t i = 0; i < count; ++i) {
      const Part part = device::load<Part>(p.classes + i);
      if (part.c_out <= m) break;
      entries += part.count;
    }
  } else {
    entries = device::load<int32_t>(p.count);
  }
  return device::slices_within(p.slices, entries * p.out.h * p.out.w, C::kDepth);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    wgrad_kernel(const __grid_constant__ Wgrad<typename C::T> p) {
  const int32_t across = (p.columns + C::kTileN - 1) / C::kTileN, down = (p.c_out + C::kTileM - 1) / C::kTileM;
  // Tiles of one slice follow one another: they read the same pixels.
  const int32_t id = static_cast<int32_t>(device::block());
  WgradTile tile{id / across % down * C::kTileM, id % across * C::kTileN, id / across / down % p.groups,
                 id / across / down / p.groups};
  const device::Slices slices = pixels_of<C>(p, tile.m);
  const int64_t begin = static_cast<int64_t>(tile.slice) * slices.slice, left = slices.rows - begin;
  tile.begin = static_cast<int32_t>(begin);
  tile.pixels = left < 0 ? 0 : left < slices.slice ? static_cast<int32_t>(left) : slices.slice;
  const int warp = device::thread() / 32, warps_across = C::kTileN / C::kWarpN;
  typename C::Sums sums(warp / warps_across * C::kWarpM, warp % warps_across * C::kWarpN);
  const int32_t steps = (tile.pixels + C::kDepth - 1) / C::kDepth;
  WgradLoader<C> loader(p, tile);
  int32_t fill = 0;  // the stage to fill next, in bytes
#pragma unroll
  for (int s = 0; s < C::kStages - 1; ++s) {
    if (s < steps) loader.load(fill);
    fill += C::kStageBytes;
    device::copy_commit();
  }
  int32_t full = 0;  // the stage to multiply
  for (int32_t ahead = steps - (C::kStages - 1); ahead > 1 - C::kStages; --ahead) {
    device::copy_wait<C::kStages - 2>();
    device::sync();  // the stage is there for all, and all are done with the one before it, which is filled next
    if (ahead > 0) loader.load(fill);
    device::copy_commit();
    fill = full;
    sums.multiply(device::shared_memory() + full);
    full = full + C::kStageBytes < C::kShared ? full + C::kStageBytes : 0;
  }
  const int64_t pitch = p.columns;
  const int64_t row = (static_cast<int64_t>(tile.slice) * p.groups + tile.group) * p.c_out + tile.m;
  sums.store({p.parts + (row * pitch + tile.n), p.c_out - tile.m, p.columns - tile.n, pitch});
}

}  // namespace effkern::conv::gpu
