// Second pass of sums over pixels: the slices' sums added up in order, one element a thread, so that the result is the
// same bits in every run. Traffic: every part once, every element of the result once.
#pragma once

#include "backward_gpu.h"

namespace effkern::conv::gpu {

constexpr int kFoldThreads = 256;

template <class T>
__global__ void __launch_bounds__(kFoldThreads, 4) fold(const __grid_constant__ Fold<T> p) {
  const int64_t step = static_cast<int64_t>(device::blocks()) * kFoldThreads;
  for (int64_t i = static_cast<int64_t>(device::block()) * kFoldThreads + device::thread(); i < p.elements; i += step) {
    const int32_t c = static_cast<int32_t>(i % p.whole_in), tap = static_cast<int32_t>(i / p.whole_in % p.taps);
    const int32_t output = static_cast<int32_t>(i / p.whole_in / p.taps);
    const int32_t group = output / p.whole_rows, o = output % p.whole_rows;
    float sum = 0.0f;
    if (group < p.groups && o < p.c_out && c < p.c_in) {
      const int64_t row = static_cast<int64_t>(group) * p.c_out + o;
      Global<const float> from = p.parts + (row * p.columns + static_cast<int64_t>(tap) * p.tap_columns + c);
      for (int32_t s = 0; s < p.slices; ++s) {
        sum += device::load<float>(from);
        from = from + p.part;
      }
    }
    const int64_t to = output * p.so + c * p.si + tap / p.kernel_w * p.sh + tap % p.kernel_w * p.sw;
    device::store(p.gw + to, device::from_float<T>(sum));
  }
}

__global__ void __launch_bounds__(kFoldThreads, 4) fold_sums(const __grid_constant__ FoldSums p) {
  const int32_t step = static_cast<int32_t>(device::blocks()) * kFoldThreads;
  for (int32_t i = static_cast<int32_t>(device::block()) * kFoldThreads + device::thread(); i < p.size; i += step) {
    float sum = 0.0f;
    for (int32_t s = 0; s < p.slices; ++s) sum += device::load<float>(p.parts + (static_cast<int64_t>(s) * p.size + i));
    device::store(p.to + i, sum);
  }
}

}  // namespace effkern::conv::gpu
