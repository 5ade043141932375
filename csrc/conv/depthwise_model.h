// What one launch of the GPU's depthwise convolution costs, from shapes alone, where all samples are of one width: the
// bytes its instructions read from and write to global memory, caches included. The tests hold the harness's counters
// to it.
#pragma once

#include "../common/cuda/traffic.h"
#include "depthwise_gpu.h"

namespace effkern::conv::gpu {

// Rows or columns of the map under all tiles along one axis, halos as often as they are read.
inline int64_t under_tiles(int32_t out, int32_t in, int32_t tile, int32_t under, int32_t stride, int32_t pad) {
  int64_t sum = 0;
  for (int32_t at = 0; at < out; at += tile) {
    const int32_t first = at * stride - pad;
    sum += std::max(0, std::min(first + under, in) - std::max(first, 0));
  }
  return sum;
}

// Channels whose filters are read, as often as they are.
template <class T>
int64_t filters_read(const DepthwiseProblem<T>& p, int64_t grid) {
  constexpr int64_t kChannels = kPixelBytes / static_cast<int64_t>(sizeof(T));
  const int64_t tiles = depthwise_tiles(p), groups = channel_groups(p);
  int64_t sum = 0;
  for (int64_t block = 0; block < grid; ++block)
    for (int64_t id = block, last = -1; id < tiles; last = id % groups, id += grid)
      if (id % groups != last) sum += std::clamp<int64_t>(p.channels - id % groups * kChannels, 0, kChannels);
  return sum;
}

template <class T>
device::Traffic depthwise_work(const DepthwiseProblem<T>& p, int64_t grid) {
  constexpr int64_t size = sizeof(T);
  const Size2 under = input_under_tile(p.kernel, p.stride, p.dilation, p.strips);
  const int32_t rows = kDepthwiseLanes / p.strips, columns = p.strips * kDepthwiseColumns;
  const int64_t across = (p.out.w + columns - 1) / columns;
  const int64_t inside = under_tiles(p.out.h, p.in.h, rows, under.h, p.stride.h, p.pad.h) *
                         under_tiles(p.out.w, p.in.w, columns, under.w, p.stride.w, p.pad.w);
  const int64_t vectors = (p.bias ? 1 : 0) + (p.scale ? 1 : 0) + (p.shift ? 1 : 0);
  const int64_t map = int64_t{p.out.h} * p.out.w * size;
  // Of a sample and channel: its input, a float of each vector in every thread, its outputs.
  const int64_t down = (p.out.h + rows - 1) / rows;
  const int64_t read = inside * size + down * rows * p.strips * across * vectors * 4 + (p.residual ? map : 0);
  const int64_t all = int64_t{p.samples} * p.channels;
  return {all * read + filters_read(p, grid) * p.kernel.h * p.kernel.w * size,
          int64_t{p.samples} * std::max(p.channels, p.zero_to) * map};
}

}  // namespace effkern::conv::gpu
