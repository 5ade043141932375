// The dense weight behind codes, channels innermost as the convolution reads it: a warp makes 32 chunks of a row at a
// time, each lane a chunk of channels of one tap. kWhole: one tap, a chunk lies in one entry and is copied 16 bytes at
// a time; else its numbers come from several codes, which L1 holds after the first. Loads of a chunk are under way
// together: all its codes, then all its numbers. Stages are summed in order in fp32, then scaled.
#pragma once

#include "codes.cuh"
#include "decode_gpu.h"

namespace effkern::pq {

constexpr int kDecodeThreads = 256, kDecodeWarps = kDecodeThreads / 32;
// Of a multiprocessor. Whole entries are two loads that wait for each other: many warps.
constexpr int decode_blocks(bool whole) { return whole ? 6 : 4; }

// kPer numbers of a row, from `at` on.
template <class T, int kPer, bool kWhole>
__device__ __forceinline__ void decode_chunk(const Decoding<T>& p, uint32_t row, int32_t at) {
  using Chunk = device::Vec<T, kPer>;
  constexpr int kCodes = kWhole ? 1 : kPer;  // of a stage
  const int32_t step_position = p.taps / p.d, step_element = p.taps % p.d, book = p.codes.entries * p.d;
  const int32_t tap = kWhole ? 0 : at / p.channels, number = kWhole ? at : at % p.channels * p.taps + tap;
  const int32_t first_position = number / p.d, first_element = number % p.d;
  const int64_t codes_of_row = row * (static_cast<int64_t>(p.positions) * p.stages);
  float sums[kPer] = {};
#pragma unroll 1
  for (int32_t stage = 0; stage < p.stages; ++stage) {
    int32_t at_code[kCodes], at_book[kCodes], code[kCodes], position = first_position, element = first_element;
#pragma unroll
    for (int e = 0; e < kCodes; ++e) {
      at_code[e] = position * p.stages + stage;
      at_book[e] = (p.book_per_position ? position : p.book_per_stage ? stage : 0) * book + element;
      position += step_position, element += step_element;
      if (element >= p.d) element -= p.d, ++position;
    }
    codes_at(p.codes, codes_of_row, at_code, code);
    if constexpr (kWhole) {
      const auto all = device::load<Chunk>(p.book + (at_book[0] + code[0] * p.d));
#pragma unroll
      for (int e = 0; e < kPer; ++e) sums[e] += device::to_float(all.v[e]);
    } else {
      T numbers[kPer];
#pragma unroll
      for (int e = 0; e < kPer; ++e) numbers[e] = device::load<T>(p.book + (at_book[e] + code[e] * p.d));
#pragma unroll
      for (int e = 0; e < kPer; ++e) sums[e] += device::to_float(numbers[e]);
    }
  }
  const float factor = p.scale ? device::load<float>(p.scale + row) : 1.0f;
  Chunk out;
#pragma unroll
  for (int e = 0; e < kPer; ++e) out.v[e] = device::from_float<T>(sums[e] * factor);
  device::store(p.y + (row * (static_cast<int64_t>(p.taps) * p.channels) + at), out);
}

template <class T, int kPer, bool kWhole>
__global__ void __launch_bounds__(kDecodeThreads, decode_blocks(kWhole)) decode(const __grid_constant__ Decoding<T> p) {
  const int32_t width = p.taps * p.channels, rounds = decode_rounds(p, kPer);
  const int32_t warps = static_cast<int32_t>(device::blocks()) * kDecodeWarps;
  const int32_t warp = static_cast<int32_t>(device::block()) * kDecodeWarps + device::thread() / 32;
  const int32_t step_row = warps / rounds, step_round = warps % rounds;
  uint32_t row = static_cast<uint32_t>(warp / rounds);
  int32_t round = warp % rounds;
  while (row < static_cast<uint32_t>(p.rows)) {
    const int32_t at = (round * 32 + device::lane()) * kPer;
    if (at < width) decode_chunk<T, kPer, kWhole>(p, row, at);
    row += static_cast<uint32_t>(step_row), round += step_round;
    if (round >= rounds) round -= rounds, ++row;
  }
}

}  // namespace effkern::pq
