// Batch norms of up to four branches, their sum and the relu, in two passes over the maps. The first takes means and
// squared deviations by Welford's update, a block 128 bytes of channels of one slice of one branch; lanes are
// combined in order around the mean of all of them, slices likewise in fp64 (Chan, Golub, LeVeque 1979). The second is
// y = relu(sum of scale * x
// + shift).
//
// Traffic: every branch once in each pass, y once; of the slices' statistics the means twice.
#pragma once

#include "../common/cuda/columns.cuh"
#include "../common/cuda/words.cuh"
#include "bn_finish.cuh"
#include "bn_gpu.h"

namespace effkern::multi_branch_bn::gpu {

using device::Shared;
using device::Vec;

constexpr int kStatisticsShared = 2 * device::kColumnShared;
constexpr int kRowsAtOnce = 3;  // that a thread of the first pass asks for before it waits

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
    for (int32_t row = place.row; row < place.end; row += kRowsAtOnce * device::kColumnLanes) {
      device::Words words[kRowsAtOnce];
#pragma unroll
      for (int a = 0; a < kRowsAtOnce; ++a)
        if (const int32_t at = row + a * device::kColumnLanes; at < place.end)
          words[a] = device::read_words<T>(x.at + (at * x.pitch + place.channel), place.count, p.maps.wide);
#pragma unroll
      for (int a = 0; a < kRowsAtOnce; ++a) {
        if (row + a * device::kColumnLanes >= place.end) break;
        float v[kPer];
        device::widen<T>(words[a], v);
        count += 1.0f;
        const float share = 1.0f / count;
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          const float delta = v[e] - mean[e];
          mean[e] = device::fma(delta, share, mean[e]);
          squares[e] = device::fma(delta, v[e] - mean[e], squares[e]);
        }
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
  // Around the first lane's mean, which is near that of all: sums of the means themselves would lose its low bits.
  const int32_t rows = place.end - place.begin, each = rows / device::kColumnLanes, rest = rows % device::kColumnLanes;
  const auto rows_of = [&](int lane) { return static_cast<float>(lane < rest ? each + 1 : each); };
  const float near = device::load<float>(means + device::thread());
  float m = 0.0f, s = 0.0f;
#pragma unroll
  for (int lane = 1; lane < device::kColumnLanes; ++lane)
    m = device::fma(rows_of(lane), device::load<float>(means + (lane * kColumns + device::thread())) - near, m);
  m = near + m / static_cast<float>(rows);
#pragma unroll
  for (int lane = 0; lane < device::kColumnLanes; ++lane) {
    const float away = device::load<float>(means + (lane * kColumns + device::thread())) - m;
    s += device::fma(rows_of(lane) * away, away,
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

__global__ void __launch_bounds__(kBranches* kTermThreads) bn_finish(const __grid_constant__ Finish p) {
  const FinishPlace place(p.channels);
  const int32_t i = place.term;
  const int64_t at = static_cast<int64_t>(i) * p.channels + place.channel;
  double mean = 0.0, variance = 0.0;
  if (p.parts) {
    const Global<const float> parts =
        p.parts + (static_cast<int64_t>(i) * p.slices.count * 2 * p.channels + place.channel);
    const auto rows_of = [&](int32_t s) {
      const int32_t left = p.slices.rows - s * p.slices.slice;
      return static_cast<double>(left < p.slices.slice ? left : p.slices.slice);
    };
    const int32_t end = place.there ? p.slices.count : 0;
    double sum = 0.0, squares = 0.0;
#pragma unroll 4
    for (int32_t s = place.lane; s < end; s += kFinishLanes) {
      const Global<const float> from = parts + static_cast<int64_t>(s) * 2 * p.channels;
      sum = device::fma(rows_of(s), static_cast<double>(device::load<float>(from)), sum);
      squares += static_cast<double>(device::load<float>(from + p.channels));
    }
    const double count = p.slices.rows;
    sum = sum_lanes(sum, first_sums());
    if (count > 0.0) mean = sum / count;
#pragma unroll 4
    for (int32_t s = place.lane; s < end; s += kFinishLanes) {
      const double away =
          static_cast<double>(device::load<float>(parts + static_cast<int64_t>(s) * 2 * p.channels)) - mean;
      squares = device::fma(rows_of(s) * away, away, squares);
    }
    squares = sum_lanes(squares, second_sums());
    if (count > 0.0) variance = squares / count;
    if (p.new_mean && place.decides()) {
      // An empty batch changes nothing; one value has no unbiased variance, and was refused.
      const double step = count > 0.0 ? p.momentum : 0.0, unbiased = count > 1.0 ? count / (count - 1.0) : 1.0;
      const double old_mean = static_cast<double>(device::load<float>(p.running_mean.of[i] + place.channel)),
                   old_variance = static_cast<double>(device::load<float>(p.running_var.of[i] + place.channel));
      device::store(p.new_mean + at, static_cast<float>((1.0 - step) * old_mean + step * mean));
      device::store(p.new_var + at, static_cast<float>((1.0 - step) * old_variance + step * (variance * unbiased)));
    }
  } else if (place.decides()) {
    mean = static_cast<double>(device::load<float>(p.running_mean.of[i] + place.channel));
    variance = static_cast<double>(device::load<float>(p.running_var.of[i] + place.channel));
  }
  if (place.decides()) {
    const double invstd = 1.0 / device::sqrt(variance + p.eps);
    device::store(p.mean + at, mean);
    device::store(p.invstd + at, invstd);
    const Affine a = affine(device::load<float>(p.weight.of[i] + place.channel),
                            device::load<float>(p.bias.of[i] + place.channel), mean, invstd);
    device::store(p.scale + at, a.scale);
    device::store(of_terms() + (i * kFinishChannels + place.column), a.shift);
  }
  device::sync();  // the branches' shifts are there
  if (i != 0 || !place.decides()) return;
  double shift = 0.0;
  for (int32_t b = 0; b < p.count; ++b)
    shift += device::load<double>(of_terms() + (b * kFinishChannels + place.column));
  device::store(p.shift + place.channel, static_cast<float>(shift));
}

// The first `count` of a thread's floats of a vector. `wide`: four may be read at once.
template <int kPer>
__device__ __forceinline__ void read_floats(Global<const float> from, int32_t count, bool wide, float (&to)[kPer]) {
#pragma unroll
  for (int e = 0; e < kPer; e += 4) {
    if (wide && count >= kPer) {
      const auto four = device::load<Vec<float, 4>>(from + e);
#pragma unroll
      for (int k = 0; k < 4; ++k) to[e + k] = four.v[k];
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (e + k < count) to[e + k] = device::load<float>(from + (e + k));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 4) bn_apply(const __grid_constant__ Apply<T> p) {
  constexpr int kPer = device::kPerChunk<T>;
  const device::ColumnPlace<T> place(p.maps.slices, p.maps.channels, static_cast<int32_t>(device::block()));
  float scale[kBranches][kPer] = {}, shift[kPer] = {};
  if (place.count == 0) return;
  const bool wide = p.maps.channels % 4 == 0;  // the vectors' rows begin at 16 bytes
  read_floats<kPer>(p.shift + place.channel, place.count, wide, shift);
#pragma unroll
  for (int i = 0; i < kBranches; ++i)
    if (i < p.maps.count)
      read_floats<kPer>(p.scale + (static_cast<int64_t>(i) * p.maps.channels + place.channel), place.count, wide,
                        scale[i]);
  for (int32_t row = place.row; row < place.end; row += device::kColumnLanes) {
    device::Words words[kBranches];
#pragma unroll
    for (int i = 0; i < kBranches; ++i)
      if (i < p.maps.count)
        words[i] =
            device::read_words<T>(p.maps.x[i].at + (row * p.maps.x[i].pitch + place.channel), place.count, p.maps.wide);
    float z[kPer];
#pragma unroll
    for (int e = 0; e < kPer; ++e) z[e] = shift[e];
#pragma unroll
    for (int i = 0; i < kBranches; ++i) {
      if (i >= p.maps.count) break;
      float x[kPer];
      device::widen<T>(words[i], x);
#pragma unroll
      for (int e = 0; e < kPer; ++e) z[e] = device::fma(scale[i][e], x[e], z[e]);
    }
#pragma unroll
    for (int e = 0; e < kPer; ++e) z[e] = p.relu && z[e] < 0.0f ? 0.0f : z[e];
    device::write_words<T>(p.y.at + (row * p.y.pitch + place.channel), device::narrow<T>(z), place.count, p.maps.wide);
  }
}

}  // namespace effkern::multi_branch_bn::gpu
