// Gradient of a depthwise convolution in its weight, bound by memory: a block takes 128 bytes of channels, up to nine
// taps and a slice of the output's pixels; a thread multiplies its chunk of gz with the chunks of x under those taps.
// The lanes' sums are added in order, the slices by fold.cuh.
//
// Traffic of a block: gz once; x once a tap, most of it from the first-level cache, since neighbouring outputs share
// inputs. Kernels above nine taps read gz again for every nine.
#pragma once

#include "../common/cuda/columns.cuh"
#include "../common/cuda/indices.cuh"
#include "backward_gpu.h"

namespace effkern::conv::gpu {

constexpr int kTapsAtOnce = 9;

// Channels of sample n that have both an input and an output.
template <class T>
__device__ __forceinline__ int32_t common_width(const Wgrad<T>& p, int32_t n) {
  const int32_t in = device::entry_of(p.in_of, n, p.groups), out = device::entry_of(p.out_of, n, p.groups);
  return in < out ? in : out;
}

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 3) depthwise_wgrad(const __grid_constant__ Wgrad<T> p) {
  constexpr int kPer = device::kPerChunk<T>;
  const int32_t taps = p.kernel.h * p.kernel.w, groups = (p.groups + device::kColumns<T> - 1) / device::kColumns<T>;
  const int32_t tap_groups = (taps + kTapsAtOnce - 1) / kTapsAtOnce;
  const int32_t id = static_cast<int32_t>(device::block());
  const int32_t channel_group = id % groups, tap = id / groups % tap_groups * kTapsAtOnce,
                slice = id / groups / tap_groups;
  const int32_t first = channel_group * device::kColumns<T>,
                channel = first + device::thread() % device::kColumnChunks * kPer, left = p.groups - channel;
  const int32_t begin = slice * p.slices.slice, rest = p.slices.rows - begin;
  const int32_t end = begin + (rest < p.slices.slice ? rest : p.slices.slice);
  float sums[kTapsAtOnce][kPer] = {};
  if (left > 0) {
    for (int32_t pixel = begin + device::thread() / device::kColumnChunks; pixel < end; pixel += device::kColumnLanes) {
      const int32_t w = pixel % p.out.w, h = pixel / p.out.w % p.out.h, n = pixel / p.out.w / p.out.h;
      const int32_t width = p.in_of.words ? common_width(p, n) - channel : left;
      const auto g = device::read_chunk<T>(p.gz + (n * p.gs.n + h * p.gs.h + w * p.gs.w + channel), width, p.wide);
      const int32_t top = h * p.stride.h - p.pad.h, side = w * p.stride.w - p.pad.w;
      const Global<const T> x = p.x + (n * p.xs.n + channel);
#pragma unroll
      for (int t = 0; t < kTapsAtOnce; ++t) {
        const int32_t y = top + (tap + t) / p.kernel.w * p.dilation.h,
                      at = side + (tap + t) % p.kernel.w * p.dilation.w;
        if (tap + t < taps && y >= 0 && y < p.in.h && at >= 0 && at < p.in.w) {
          const auto in = device::read_chunk<T>(x + (y * p.xs.h + at * p.xs.w), width, p.wide);
#pragma unroll
          for (int e = 0; e < kPer; ++e)
            sums[t][e] = device::fma(device::to_float(g.v[e]), device::to_float(in.v[e]), sums[t][e]);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTapsAtOnce; ++t) {
    const float sum = device::sum_lanes<T>(sums[t]);
    const int32_t mine = first + device::thread();
    if (tap + t < taps && device::thread() < device::kColumns<T> && mine < p.groups)
      device::store(p.parts + ((static_cast<int64_t>(slice) * p.groups + mine) * taps + tap + t), sum);
  }
}

}  // namespace effkern::conv::gpu
