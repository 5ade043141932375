// Rows of a coded table, and sums of them: a warp makes one row of the output, each lane 16 bytes of it at a time,
// which lie in one entry of the book. Sums run over the bag in order and over stages in theirs, so they are the same in
// every run. Traffic of a row: its codes and its output once; the books, a few KiB, stay in L1.
#pragma once

#include "../common/cuda/indices.cuh"
#include "codes.cuh"
#include "embedding_gpu.h"

namespace effkern::pq {

constexpr int kLookupThreads = 256, kLookupWarps = kLookupThreads / 32;

template <class T, bool kWide>
__global__ void __launch_bounds__(kLookupThreads, 4) lookup(const __grid_constant__ Lookup<T> p) {
  constexpr int kPer = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
  using Chunk = device::Vec<T, kPer>;
  const int32_t width = p.positions * p.d, step = static_cast<int32_t>(device::blocks()) * kLookupWarps;
  int32_t bag = static_cast<int32_t>(device::block()) * kLookupWarps + device::thread() / 32;
  for (; bag < p.bags; bag += step) {
    int32_t begin = bag, end = bag + 1;
    if (p.offsets.words) {
      begin = device::entry_of(p.offsets, bag, p.count);
      end = bag + 1 < p.bags ? device::entry_of(p.offsets, bag + 1, p.count) : p.count;
    }
    for (int32_t at = device::lane() * kPer; at < width; at += 32 * kPer) {
      const int32_t position = at / p.d, element = at % p.d;
      float sums[kPer] = {};
      int32_t kept = 0;
      for (int32_t i = begin; i < end; ++i) {
        const int32_t row = device::entry_of(p.idx, i, p.rows - 1);
        if (row == p.padding) continue;
        ++kept;
        float factor = p.scale ? device::load<float>(p.scale + row) : 1.0f;
        float decoded[kPer] = {};
        for (int32_t stage = 0; stage < p.stages; ++stage) {
          const int32_t code =
              code_at(p.codes, (static_cast<int64_t>(row) * p.positions + position) * p.stages + stage);
          const int64_t book = p.book_per_position ? position : p.book_per_stage ? stage : 0;
          const auto entry = device::load<Chunk>(p.book + ((book * p.codes.entries + code) * p.d + element));
#pragma unroll
          for (int e = 0; e < kPer; ++e) decoded[e] += device::to_float(entry.v[e]);
        }
        const float weight = p.weights ? device::load<float>(p.weights + i) : 1.0f;
#pragma unroll
        for (int e = 0; e < kPer; ++e) sums[e] += decoded[e] * factor * weight;
      }
      Chunk out;
      const float divisor = p.mean && kept > 0 ? static_cast<float>(kept) : 1.0f;
#pragma unroll
      for (int e = 0; e < kPer; ++e) out.v[e] = device::from_float<T>(sums[e] / divisor);
      device::store(p.y + (static_cast<int64_t>(bag) * width + at), out);
    }
  }
}

}  // namespace effkern::pq
