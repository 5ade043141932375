// What the GPU's depthwise convolution (depthwise.cuh) is given: one filter a channel, a prefix of the channels, which
// may differ by sample.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/cuda/indices.h"
#include "../common/cuda/stream.h"
#include "conv_gpu.h"

namespace effkern::conv::gpu {

template <class T>
struct DepthwiseProblem {
  Global<const T> x, weight, residual;  // residual may be null
  Global<T> y;
  Strides xs, rs, ys;                          // channels are contiguous
  int64_t weight_channel, weight_h, weight_w;  // strides of the weight
  Size2 in, out, kernel, stride, pad, dilation;
  int32_t samples, channels;
  device::Indices c_in, c_out;  // with them sample n has min(c_in[n], c_out[n], channels) channels
  int32_t zero_to;              // channels from a sample's last to this one become zeros; 0: they are not touched
  Global<const float> bias, scale, shift;
  int64_t table_stride;
  device::Indices table;  // the row of each sample; without words: row 0
  int32_t most_row;
  Act act;
  bool wide_x, wide_y, wide_residual;  // 16-byte access to every chunk of channels
  int32_t strips;                      // of 4 columns side by side in a tile: 1, 2 or 4, with 16, 8 or 4 rows
};

constexpr int kDepthwiseThreads = 128, kDepthwiseColumns = 4;  // columns of a thread
constexpr int kPixelBytes = 128;                               // channels of a tile: 64 of 16 bits, 32 of fp32
constexpr int kDepthwiseLanes = kDepthwiseThreads / (kPixelBytes / 16);
constexpr int kMostDepthwiseShared = 96 << 10;  // so that every part can run a block

// Input under a tile, rows and columns.
EFFKERN_BOTH Size2 input_under_tile(Size2 kernel, Size2 stride, Size2 dilation, int32_t strips) {
  return {(kDepthwiseLanes / strips - 1) * stride.h + (kernel.h - 1) * dilation.h + 1,
          (strips * kDepthwiseColumns - 1) * stride.w + (kernel.w - 1) * dilation.w + 1};
}

// Bytes of shared memory: the input, and the filters as fp32.
template <class T>
int64_t depthwise_shared(const DepthwiseProblem<T>& p) {
  const Size2 under = input_under_tile(p.kernel, p.stride, p.dilation, p.strips);
  const int64_t filters = int64_t{p.kernel.h} * p.kernel.w * (kPixelBytes / static_cast<int64_t>(sizeof(T))) * 4;
  return int64_t{under.h} * under.w * kPixelBytes + filters;
}

inline int32_t strips_for(int32_t width) { return width <= 4 ? 1 : width <= 8 ? 2 : 4; }

// Whether the kernel can run it.
template <class T>
bool fits(const DepthwiseProblem<T>& p) {
  return std::max({p.kernel.h, p.kernel.w, p.stride.h, p.stride.w, p.dilation.h, p.dilation.w}) <= 64 &&
         depthwise_shared(p) <= kMostDepthwiseShared;
}

// Groups of channels of a tile.
template <class T>
int64_t channel_groups(const DepthwiseProblem<T>& p) {
  constexpr int64_t kChannels = kPixelBytes / static_cast<int64_t>(sizeof(T));
  return (std::max(p.channels, p.zero_to) + kChannels - 1) / kChannels;
}

// The tiles of a launch; 2^31 or more cannot be run. Tile t is of group t % channel_groups.
template <class T>
int64_t depthwise_tiles(const DepthwiseProblem<T>& p) {
  const auto parts = [](int64_t size, int64_t by) { return (size + by - 1) / by; };
  return channel_groups(p) * parts(p.out.w, p.strips * kDepthwiseColumns) * parts(p.out.h, kDepthwiseLanes / p.strips) *
         p.samples;
}

// Blocks of a launch, at most `resident`. Block b takes tiles b, b + grid, ...: where it can, a grid of whole groups,
// so that all of a block's tiles have the same filters.
template <class T>
unsigned depthwise_grid(const DepthwiseProblem<T>& p, unsigned resident) {
  const int64_t grid = std::min<int64_t>(depthwise_tiles(p), resident), groups = channel_groups(p);
  return static_cast<unsigned>(grid > groups ? grid - grid % groups : grid);
}

void run(const DepthwiseProblem<device::F16>& p, device::Stream stream);
void run(const DepthwiseProblem<device::BF16>& p, device::Stream stream);
void run(const DepthwiseProblem<float>& p, device::Stream stream);

}  // namespace effkern::conv::gpu
