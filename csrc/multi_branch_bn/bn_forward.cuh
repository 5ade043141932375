// Batch norms of up to four branches, their sum and the relu, in two passes over the maps. The first takes means and
// squared deviations by Welford's update, a block 128 bytes of channels of one slice of one branch; lanes and then
// slices are combined in order (Chan, Golub, LeVeque 1979), the slices in fp64. The second is y = relu(sum of scale * x
// + shift).
//
// Traffic: every branch once in each pass, y once.
#pragma once

#include "../common/cuda/columns.cuh"
#include "bn_gpu.h"

namespace effkern::multi_branch_bn::gpu {

using device::Shared;
using device::Vec;

constexpr int kStatisticsShared = 2 * device::kColumnShared, kFinishThreads = 128;

// Adds n values of a mean and squared deviations to what was counted before; n may be 0.
template <class F>
__device__ __forceinline__ void combine(F& count, F& mean, F& squares, F n, F other_mean, F other_squares) {
  if (n == F{0}) return;
  const F all = count + n, delta = other_mean - mean;
  mean = mean + delta * (n / all);
  squares = squares + other_squares + delta * delta * (count * n / all);
  count = all;
}

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 8) bn_statistics(const __grid_constant__ Statistics<T> p) {
  constexpr int kPer = device::kPerChunk<T>, kColumns = device::kColumns<T>;
  const int32_t blocks = device::column_groups<T>(p.maps.channels) * p.maps.slices.count;
  const int32_t id = static_cast<int32_t>(device::block()), branch = id / blocks;
  const device::ColumnPlace<T> place(p.maps.slices, p.maps.channels, id % blocks);
  const device::Rows<const T> x = p.maps.x[branch];
  float mean[kPer] = {}, squares[kPer] = {};
  if (place.count > 0) {
    float count = 0.0f;
    for (int32_t row = place.row; row < place.end; row += device::kColumnLanes) {
      const auto chunk = device::read_chunk<T>(x.at + (row * x.pitch + place.channel), place.count, p.maps.wide);
      count += 1.0f;
      const float share = 1.0f / count;
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const float v = device::to_float(chunk.v[e]), delta = v - mean[e];
        mean[e] = device::fma(delta, share, mean[e]);
        squares[e] = device::fma(delta, v - mean[e], squares[e]);
      }
    }
  }
  const Shared<float> means = device::shared_memory().template as<float>();
  const Shared<float> all_squares = means + device::kColumnThreads * kPer;
  device::stage_lanes<T>(mean, means);
  device::stage_lanes<T>(squares, all_squares);
  device::sync();  // the lanes' statistics are there
  const int32_t channel = place.first + device::thread();
  if (device::thread() >= kColumns || channel >= p.maps.channels) return;
  float count = 0.0f, m = 0.0f, s = 0.0f;
  for (int lane = 0; lane < device::kColumnLanes; ++lane) {
    const int32_t rows = (place.end - place.begin - lane + device::kColumnLanes - 1) / device::kColumnLanes;
    combine(count, m, s, static_cast<float>(rows > 0 ? rows : 0),
            device::load<float>(means + (lane * kColumns + device::thread())),
            device::load<float>(all_squares + (lane * kColumns + device::thread())));
  }
  const Global<float> to =
      p.parts + ((static_cast<int64_t>(branch) * p.maps.slices.count + place.slice) * 2 * p.maps.channels + channel);
  device::store(to, m);
  device::store(to + p.maps.channels, s);
}

// The factor of x, and what a branch adds to y besides: the same bits wherever they are made.
struct Affine {
  float scale;
  double shift;
};
__device__ __forceinline__ Affine affine(float weight, float bias, double mean, double invstd) {
  const double scale = static_cast<double>(weight) * invstd;
  return {static_cast<float>(scale), device::fma(-mean, scale, static_cast<double>(bias))};
}

__global__ void __launch_bounds__(kFinishThreads, 8) bn_finish(const __grid_constant__ Finish p) {
  const int32_t channel = static_cast<int32_t>(device::block()) * kFinishThreads + device::thread();
  if (channel >= p.channels) return;
  double shift = 0.0;
  for (int32_t i = 0; i < p.count; ++i) {
    const int64_t at = static_cast<int64_t>(i) * p.channels + channel;
    double mean = 0.0, variance = 0.0;
    if (p.parts) {
      double count = 0.0, squares = 0.0;
      for (int32_t s = 0; s < p.slices.count; ++s) {
        const int32_t left = p.slices.rows - s * p.slices.slice;
        const Global<const float> from =
            p.parts + ((static_cast<int64_t>(i) * p.slices.count + s) * 2 * p.channels + channel);
        combine(count, mean, squares, static_cast<double>(left < p.slices.slice ? left : p.slices.slice),
                static_cast<double>(device::load<float>(from)),
                static_cast<double>(device::load<float>(from + p.channels)));
      }
      if (count > 0.0) variance = squares / count;
      if (p.new_mean) {
        // An empty batch changes nothing; one value has no unbiased variance, and was refused.
        const double step = count > 0.0 ? p.momentum : 0.0, unbiased = count > 1.0 ? count / (count - 1.0) : 1.0;
        const double old_mean = static_cast<double>(device::load<float>(p.running_mean.of[i] + channel)),
                     old_variance = static_cast<double>(device::load<float>(p.running_var.of[i] + channel));
        device::store(p.new_mean + at, static_cast<float>((1.0 - step) * old_mean + step * mean));
        device::store(p.new_var + at, static_cast<float>((1.0 - step) * old_variance + step * (variance * unbiased)));
      }
    } else {
      mean = static_cast<double>(device::load<float>(p.running_mean.of[i] + channel));
      variance = static_cast<double>(device::load<float>(p.running_var.of[i] + channel));
    }
    const double invstd = 1.0 / device::sqrt(variance + p.eps);
    device::store(p.mean + at, mean);
    device::store(p.invstd + at, invstd);
    const Affine a = affine(device::load<float>(p.weight.of[i] + channel), device::load<float>(p.bias.of[i] + channel),
                            mean, invstd);
    device::store(p.scale + at, a.scale);
    shift += a.shift;
  }
  device::store(p.shift + channel, static_cast<float>(shift));
}

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 4) bn_apply(const __grid_constant__ Apply<T> p) {
  constexpr int kPer = device::kPerChunk<T>;
  const device::ColumnPlace<T> place(p.maps.slices, p.maps.channels, static_cast<int32_t>(device::block()));
  float scale[kBranches][kPer] = {}, shift[kPer] = {};
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    if (e >= place.count) continue;
    shift[e] = device::load<float>(p.shift + (place.channel + e));
#pragma unroll
    for (int i = 0; i < kBranches; ++i)
      if (i < p.maps.count)
        scale[i][e] = device::load<float>(p.scale + (static_cast<int64_t>(i) * p.maps.channels + place.channel + e));
  }
  if (place.count == 0) return;
  for (int32_t row = place.row; row < place.end; row += device::kColumnLanes) {
    float z[kPer];
#pragma unroll
    for (int e = 0; e < kPer; ++e) z[e] = shift[e];
#pragma unroll
    for (int i = 0; i < kBranches; ++i) {
      if (i >= p.maps.count) break;
      const auto x =
          device::read_chunk<T>(p.maps.x[i].at + (row * p.maps.x[i].pitch + place.channel), place.count, p.maps.wide);
#pragma unroll
      for (int e = 0; e < kPer; ++e) z[e] = device::fma(scale[i][e], device::to_float(x.v[e]), z[e]);
    }
    Vec<T, kPer> y;
#pragma unroll
    for (int e = 0; e < kPer; ++e) y.v[e] = device::from_float<T>(p.relu && z[e] < 0.0f ? 0.0f : z[e]);
    device::write_chunk<T>(p.y.at + (row * p.y.pitch + place.channel), y, place.count, p.maps.wide);
  }
}

}  // namespace effkern::multi_branch_bn::gpu
