// The dense weight behind codes, channels innermost as the convolution reads it: a warp makes a row, each lane a chunk
// of channels of one tap at a time. kWhole: a chunk lies in one entry and is copied 16 bytes at a time; else its
// numbers come from several codes, which L1 holds after the first. Stages are summed in order in fp32, then scaled.
#pragma once

#include "codes.cuh"
#include "decode_gpu.h"

namespace effkern::pq {

constexpr int kDecodeThreads = 256, kDecodeWarps = kDecodeThreads / 32;

template <class T, int kPer, bool kWhole>
__global__ void __launch_bounds__(kDecodeThreads, 4) decode(const __grid_constant__ Decoding<T> p) {
  using Chunk = device::Vec<T, kPer>;
  const int32_t width = p.taps * p.channels, step_position = p.taps / p.d, step_element = p.taps % p.d;
  const int64_t codes_a_row = static_cast<int64_t>(p.positions) * p.stages;
  int64_t row = static_cast<int64_t>(device::block()) * kDecodeWarps + device::thread() / 32;
  for (; row < p.rows; row += static_cast<int64_t>(device::blocks()) * kDecodeWarps) {
    const float factor = p.scale ? device::load<float>(p.scale + row) : 1.0f;
    for (int32_t at = device::lane() * kPer; at < width; at += 32 * kPer) {
      const int32_t tap = at / p.channels, number = at % p.channels * p.taps + tap;
      int32_t position = number / p.d, element = number % p.d;
      float sums[kPer] = {};
      // Goes over the chunk's numbers, or over the one entry that has them all.
#pragma unroll
      for (int e = 0; e < (kWhole ? 1 : kPer); ++e) {
        for (int32_t stage = 0; stage < p.stages; ++stage) {
          const int32_t code = code_at(p.codes, row * codes_a_row + static_cast<int64_t>(position) * p.stages + stage);
          const int64_t book = p.book_per_position ? position : p.book_per_stage ? stage : 0;
          const Global<const T> entry = p.book + ((book * p.codes.entries + code) * p.d + element);
          if constexpr (kWhole) {
            const auto all = device::load<Chunk>(entry);
#pragma unroll
            for (int i = 0; i < kPer; ++i) sums[i] += device::to_float(all.v[i]);
          } else {
            sums[e] += device::to_float(device::load<T>(entry));
          }
        }
        position += step_position, element += step_element;
        if (element >= p.d) element -= p.d, ++position;
      }
      Chunk out;
#pragma unroll
      for (int e = 0; e < kPer; ++e) out.v[e] = device::from_float<T>(sums[e] * factor);
      device::store(p.y + (row * width + at), out);
    }
  }
}

}  // namespace effkern::pq
