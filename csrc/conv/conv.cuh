// Implicit-GEMM convolution for sm_80 and later: rows are the output pixels of all listed samples, columns the active
// output channels, K the taps times the active input channels. Blocks walk tiles until the lists end, so the launch
// depends on nothing the device knows. Stages of shared memory are filled by asynchronous copies, kStages - 1 blocks of
// K ahead, with one barrier a block. No K is split: a sample's result depends on nothing but the sample and the layer.
//
// Traffic of one tile: (kTileM + kTileN) * K elements in, kTileM * kTileN out.
#pragma once

#include <type_traits>

#include "conv_epilogue.cuh"

namespace effkern::conv::gpu {

template <Math kMath_, class T_, int kTileM_, int kTileN_, int kWarpM_, int kWarpN_, int kStages_, int kHalves_,
          int kBlocks_, bool kAligned_>
struct Config {
  using T = T_;
  static constexpr Math kMath = kMath_;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kWarpN = kWarpN_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;     // that one multiprocessor is to hold, which bounds the registers
  static constexpr bool kAligned = kAligned_;  // 16-byte copies: base, strides and c_in's chunks allow them
  static constexpr int kWarps = kTileM / kWarpM * (kTileN / kWarpN), kThreads = kWarps * 32;
  static_assert(kHalves_ == 1 || kHalves_ == 2);
  static constexpr int kHalves = kHalves_;  // rows of 64 bytes a stage and operand: what a turn's overhead is shared by
  static constexpr int kHalfDepth = kRowBytes / static_cast<int>(sizeof(T)), kDepth = kHalves * kHalfDepth;  // of K
  static constexpr int kHalfBytes = (kTileM + kTileN) * kRowBytes, kStageBytes = kHalves * kHalfBytes;
  using Sums = std::conditional_t<kMath == Math::F32, Fmas<Config>, TensorCore<Config>>;
};

template <class C>
constexpr int kSharedBytes =
    C::kStages * C::kStageBytes > Epilogue<C>::kBytes ? C::kStages * C::kStageBytes : Epilogue<C>::kBytes;

// The id-th tile of the launch; false past the last one. Tiles of neighbouring output channels follow one another: they
// read the same rows of x.
template <class C>
__device__ __forceinline__ bool locate(const Problem<typename C::T>& p, int32_t id, Tile& tile) {
  const int32_t parts = p.parts ? device::load<int32_t>(p.part_count) : 1;
  for (int32_t i = 0; i < parts; ++i) {
    tile.part = p.parts ? device::load<Part>(p.parts + i) : p.whole;
    if (p.count) tile.part.count = device::load<int32_t>(p.count);
    tile.rows = tile.part.count * p.out.h * p.out.w;
    const int32_t columns = tile.part.c_out > p.zero_to ? tile.part.c_out : p.zero_to;
    const int32_t down = ceil_div(tile.rows, C::kTileM), across = ceil_div(columns, C::kTileN);
    if (id < down * across * p.groups) {
      tile.n = id % across * C::kTileN;
      tile.m = id / across % down * C::kTileM;
      tile.group = id / across / down;
      return true;
    }
    id -= down * across * p.groups;
  }
  return false;
}

template <class C>
__device__ __forceinline__ void convolve(const Problem<typename C::T>& p, const Tile& tile) {
  const int warp = device::thread() / 32, across = C::kTileN / C::kWarpN;
  const int warp_m = warp / across * C::kWarpM, warp_n = warp % across * C::kWarpN;
  const int32_t depth = ceil_div(tile.part.c_in, C::kDepth);
  const int32_t steps = tile.n < tile.part.c_out ? p.kernel.h * p.kernel.w * depth : 0;  // else only zeros to write
  typename C::Sums sums(warp_m, warp_n);
  if (steps > 0) {
    Loader<C> loader(p, tile);
#pragma unroll
    for (int s = 0; s < C::kStages - 1; ++s) {
      if (s < steps) loader.load();
      device::copy_commit();
    }
    int32_t full = 0, c = 0;  // the stage to multiply, in bytes, and its first channel
    for (int32_t ahead = steps - (C::kStages - 1); ahead > 1 - C::kStages; --ahead) {
      device::copy_wait<C::kStages - 2>();
      device::sync();  // the stage is there for all, and all are done with the one before it, which is filled next
      sums.multiply(device::shared_memory() + full);
      // Between the products, which run on while addresses are worked out, and not in front of them.
      if (ahead > 0) loader.load();
      device::copy_commit();
      if constexpr (C::kHalves == 2)
        if (c + C::kHalfDepth < tile.part.c_in) sums.multiply(device::shared_memory() + (full + C::kHalfBytes));
      c = c + C::kDepth < tile.part.c_in ? c + C::kDepth : 0;
      full = full + C::kStageBytes < C::kStages * C::kStageBytes ? full + C::kStageBytes : 0;
    }
    device::sync();  // the stages become the epilogue's; the last turn left no copy behind
  }
  Epilogue<C>::place_rows(p, tile);
  device::sync();
  Epilogue<C>(p, tile, warp, warp_m, warp_n).run(sums);
  device::sync();  // the epilogue's memory becomes the next tile's stages
}

// Samples that only copy their residual, in pieces that blocks take from the last one on: those had the fewest tiles.
template <class C>
__device__ __forceinline__ void copy_rest(const Problem<typename C::T>& p) {
  using T = typename C::T;
  constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kPiece = C::kThreads * kPer * 4;
  const int32_t done = p.count ? device::load<int32_t>(p.count) : p.whole.count;
  const int32_t size = static_cast<int32_t>(p.ys.n), pieces = ceil_div(size, kPiece);
  const int32_t blocks = static_cast<int32_t>(device::blocks());
  for (int32_t id = blocks - 1 - static_cast<int32_t>(device::block()); id < (p.copied - done) * pieces; id += blocks) {
    const int32_t entry = done + id / pieces, begin = id % pieces * kPiece;
    const int32_t end = begin + kPiece < size ? begin + kPiece : size;
    const Global<const T> from = p.residual + sample_of<T>(p.residual_rows, entry) * p.rs.n;
    const Global<T> to = p.y + sample_of<T>(p.y_rows, entry) * p.ys.n;
    if (p.wide_y && p.wide_residual) {  // then samples are whole chunks
      for (int32_t i = begin + device::thread() * kPer; i < end; i += C::kThreads * kPer)
        device::store(to + i, device::load<Vec<T, kPer>>(from + i));
    } else {
      for (int32_t i = begin + device::thread(); i < end; i += C::kThreads)
        device::store(to + i, device::load<T>(from + i));
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    conv_kernel(const __grid_constant__ Problem<typename C::T> p) {
  Tile tile;
  for (int32_t id = static_cast<int32_t>(device::block()); locate<C>(p, id, tile);
       id += static_cast<int32_t>(device::blocks()))
    convolve<C>(p, tile);
  if (p.copied > 0) copy_rest<C>(p);
}

}  // namespace effkern::conv::gpu
