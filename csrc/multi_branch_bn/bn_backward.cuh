// Gradient of y = relu(sum of batch_norm(x_i)). With g = grad where y > 0 and m pixels:
//   dbias = sum of g, dweight_i = invstd_i * sum of g * (x_i - mean_i),
//   dx_i = scale_i * (g - dbias / m - (x_i - mean_i) * invstd_i * dweight_i / m), the last two terms in training only.
// Two passes over grad and the branches: sums by slices, added up in order in fp64, and dx. y is not kept: its sign is
// made again from the branches with the very factors of the forward pass.
#pragma once

#include "bn_forward.cuh"

namespace effkern::multi_branch_bn::gpu {

// Vectors of a block's channels in shared memory, behind what sums of lanes need: [vector][channel].
enum Vector { kShift, kScale, kMean = kScale + kBranches, kSlope = kMean + kBranches, kOffset = kSlope + kBranches };
template <class T>
constexpr int kVectorBytes = device::kColumns<T> * 4;
template <class T>
constexpr int kSumsShared = device::kColumnShared + kSlope * kVectorBytes<T>;
template <class T>
constexpr int kGradientShared = device::kColumnShared + (kOffset + kBranches) * kVectorBytes<T>;

template <class T>
__device__ __forceinline__ Shared<float> vector_at(int vector) {
  return (device::shared_memory() + (device::kColumnShared + vector * kVectorBytes<T>)).template as<float>();
}

template <class T>
__device__ __forceinline__ void place_vectors(const Gradient<T>& p, const device::ColumnPlace<T>& place) {
  const int32_t channel = place.first + device::thread();
  if (device::thread() >= device::kColumns<T>) return;
  const bool there = channel < p.maps.channels;
  double shift = 0.0;
  for (int32_t i = 0; i < p.maps.count; ++i) {
    const int64_t at = static_cast<int64_t>(i) * p.maps.channels + channel;
    const double mean = there ? device::load<double>(p.mean + at) : 0.0;
    Affine a{};
    if (there)
      a = affine(device::load<float>(p.weight.of[i] + channel), device::load<float>(p.bias.of[i] + channel), mean,
                 device::load<double>(p.invstd + at));
    shift += a.shift;
    device::store(vector_at<T>(kScale + i) + device::thread(), a.scale);
    device::store(vector_at<T>(kMean + i) + device::thread(), static_cast<float>(mean));
  }
  device::store(vector_at<T>(kShift) + device::thread(), static_cast<float>(shift));
}

// The thread's channels of a vector.
template <class T>
__device__ __forceinline__ void take(int vector, float (&to)[device::kPerChunk<T>]) {
  constexpr int kPer = device::kPerChunk<T>;
  const Shared<float> from = vector_at<T>(vector) + device::thread() % device::kColumnChunks * kPer;
#pragma unroll
  for (int e = 0; e < kPer; e += 4) {
    const auto four = device::load<Vec<float, 4>>(from + e);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[e + k] = four.v[k];
  }
}

// One row of a thread: the branches, and g.
template <class T>
struct Row {
  static constexpr int kPer = device::kPerChunk<T>;
  device::Words x[kBranches];
  float g[kPer];

  __device__ __forceinline__ Row(const Gradient<T>& p, const device::ColumnPlace<T>& place, int32_t row) {
    const auto grad = device::read_words<T>(p.grad.at + (row * p.grad.pitch + place.channel), place.count, p.maps.wide);
#pragma unroll
    for (int i = 0; i < kBranches; ++i)
      if (i < p.maps.count)
        x[i] =
            device::read_words<T>(p.maps.x[i].at + (row * p.maps.x[i].pitch + place.channel), place.count, p.maps.wide);
    float z[kPer];
    if (p.relu) {
      take<T>(kShift, z);
#pragma unroll
      for (int i = 0; i < kBranches; ++i) {
        if (i >= p.maps.count) break;
        float scale[kPer], v[kPer];
        take<T>(kScale + i, scale), device::widen<T>(x[i], v);
#pragma unroll
        for (int e = 0; e < kPer; ++e) z[e] = device::fma(scale[e], v[e], z[e]);
      }
    }
    device::widen<T>(grad, g);
#pragma unroll
    for (int e = 0; e < kPer; ++e) g[e] = p.relu && z[e] <= 0.0f ? 0.0f : g[e];  // NaN passes
  }
};

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 3)
    bn_gradient_sums(const __grid_constant__ GradientSums<T> p) {
  constexpr int kPer = device::kPerChunk<T>;
  const Gradient<T>& of = p.of;
  const device::ColumnPlace<T> place(of.maps.slices, of.maps.channels, static_cast<int32_t>(device::block()));
  place_vectors<T>(of, place);
  device::sync();  // the vectors are there
  float sums[1 + kBranches][kPer] = {};
  if (place.count > 0) {
    for (int32_t row = place.row; row < place.end; row += device::kColumnLanes) {
      const Row<T> r(of, place, row);
#pragma unroll
      for (int e = 0; e < kPer; ++e) sums[0][e] += r.g[e];
#pragma unroll
      for (int i = 0; i < kBranches; ++i) {
        if (i >= of.maps.count) break;
        float mean[kPer], x[kPer];
        take<T>(kMean + i, mean), device::widen<T>(r.x[i], x);
#pragma unroll
        for (int e = 0; e < kPer; ++e) sums[1 + i][e] = device::fma(r.g[e], x[e] - mean[e], sums[1 + i][e]);
      }
    }
  }
  const int32_t channel = place.first + device::thread();
#pragma unroll
  for (int i = 0; i < 1 + kBranches; ++i) {
    if (i > of.maps.count) break;
    const float sum = device::sum_lanes<T>(sums[i]);
    if (device::thread() < device::kColumns<T> && channel < of.maps.channels)
      device::store(
          p.parts + ((static_cast<int64_t>(place.slice) * (1 + of.maps.count) + i) * of.maps.channels + channel), sum);
  }
}

__global__ void __launch_bounds__((1 + kBranches) * kTermThreads)
    bn_gradient_finish(const __grid_constant__ GradientFinish p) {
  const FinishPlace place(p.channels);
  const int32_t terms = 1 + p.count, end = place.there ? p.slices.count : 0;
  double mine = 0.0;
#pragma unroll 8
  for (int32_t s = place.lane; s < end; s += kFinishLanes)
    mine += static_cast<double>(
        device::load<float>(p.parts + ((static_cast<int64_t>(s) * terms + place.term) * p.channels + place.channel)));
  const double sum = sum_lanes(mine, first_sums());
  if (place.decides() && place.term == 0) device::store(of_terms() + place.column, sum);
  device::sync();  // dbias is there
  if (!place.decides()) return;
  const double dbias = device::load<double>(of_terms() + place.column);
  if (place.term == 0) {
    device::store(p.dbias + place.channel, static_cast<float>(dbias));
    return;
  }
  const int32_t i = place.term - 1;
  const int64_t at = static_cast<int64_t>(i) * p.channels + place.channel;
  const double mean = device::load<double>(p.mean + at), invstd = device::load<double>(p.invstd + at);
  const double rounding = mean - static_cast<double>(static_cast<float>(mean));  // x was taken from the rounded mean
  const double dweight = invstd * (sum - rounding * dbias), share = 1.0 / p.slices.rows;
  const double scale = static_cast<double>(device::load<float>(p.weight.of[i] + place.channel)) * invstd * share;
  device::store(p.dweight + at, static_cast<float>(dweight));
  device::store(p.slope + at, static_cast<float>(-scale * invstd * dweight));
  device::store(p.offset + at, static_cast<float>(-scale * (dbias - rounding * invstd * dweight)));
}

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 4)
    bn_gradient_apply(const __grid_constant__ GradientApply<T> p) {
  constexpr int kPer = device::kPerChunk<T>;
  const Gradient<T>& of = p.of;
  const device::ColumnPlace<T> place(of.maps.slices, of.maps.channels, static_cast<int32_t>(device::block()));
  place_vectors<T>(of, place);
  const int32_t channel = place.first + device::thread();
  if (device::thread() < device::kColumns<T>) {
    for (int32_t i = 0; i < of.maps.count; ++i) {
      const int64_t at = static_cast<int64_t>(i) * of.maps.channels + channel;
      const bool there = channel < of.maps.channels;
      device::store(vector_at<T>(kSlope + i) + device::thread(), there ? device::load<float>(p.slope + at) : 0.0f);
      device::store(vector_at<T>(kOffset + i) + device::thread(), there ? device::load<float>(p.offset + at) : 0.0f);
    }
  }
  device::sync();  // the vectors are there
  if (place.count == 0) return;
  for (int32_t row = place.row; row < place.end; row += device::kColumnLanes) {
    const Row<T> r(of, place, row);
#pragma unroll
    for (int i = 0; i < kBranches; ++i) {
      if (i >= of.maps.count) break;
      if (!p.dx[i].at) continue;
      float scale[kPer], mean[kPer], slope[kPer], offset[kPer];
      take<T>(kScale + i, scale), take<T>(kMean + i, mean), take<T>(kSlope + i, slope), take<T>(kOffset + i, offset);
      float dx[kPer];
      device::widen<T>(r.x[i], dx);
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const float away = dx[e] - mean[e];
        const float rest = p.training ? device::fma(slope[e], away, offset[e]) : 0.0f;  // away may be infinite
        dx[e] = device::fma(scale[e], r.g[e], rest);
      }
      device::write_words<T>(p.dx[i].at + (row * p.dx[i].pitch + place.channel), device::narrow<T>(dx), place.count,
                             of.maps.wide);
    }
  }
}

}  // namespace effkern::multi_branch_bn::gpu
