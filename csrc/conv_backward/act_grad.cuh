// gz = gy times the activation's slope, and the sums of gz by channel, in one pass. A block takes 128 bytes of channels
// of a slice of pixels; its lanes' sums are added in order.
//
// Traffic: gy, y and gz once each, and a float a channel and slice.
#pragma once

#include "../common/cuda/columns.cuh"
#include "backward_gpu.h"

namespace effkern::conv::gpu {

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 8) act_grad(const __grid_constant__ ActGrad<T> p) {
  constexpr int kPer = device::kPerChunk<T>;
  const device::ColumnPlace<T> place(p.slices, p.channels, static_cast<int32_t>(device::block()));
  // As in torch a NaN output lets the gradient through; nothing is above the bound that relu does not have.
  const float most = p.relu6 ? 6.0f : __builtin_nanf("");
  float sums[kPer] = {};
  if (place.count > 0) {
    for (int32_t row = place.row; row < place.end; row += device::kColumnLanes) {
      auto g = device::read_chunk<T>(p.gy.at + (row * p.gy.pitch + place.channel), place.count, p.wide);
      if (p.y.at) {
        const auto y = device::read_chunk<T>(p.y.at + (row * p.y.pitch + place.channel), place.count, p.wide);
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          const float v = device::to_float(y.v[e]);
          if (v <= 0.0f || v >= most) g.v[e] = T{};
        }
      }
      if (p.gz.at) device::write_chunk<T>(p.gz.at + (row * p.gz.pitch + place.channel), g, place.count, p.wide);
#pragma unroll
      for (int e = 0; e < kPer; ++e) sums[e] += device::to_float(g.v[e]);
    }
  }
  if (!p.sums) return;
  const float sum = device::sum_lanes<T>(sums);
  const int32_t channel = place.first + device::thread();
  if (device::thread() < device::kColumns<T> && channel < p.channels)
    device::store(p.sums + (static_cast<int64_t>(place.slice) * p.channels + channel), sum);
}

}  // namespace effkern::conv::gpu
