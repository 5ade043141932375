// Sorts the samples of a ragged batch into classes of equal widths, without a trip to the host: one thread block, which
// takes the widest class first (its tiles take longest), so that the order is the same in every run. Each pass over the
// samples appends one class to the list, in ascending order of its samples, and finds the next one. Traffic: the widths
// once a class, the list and the parts once.
#pragma once

#include "../common/cuda/indices.cuh"
#include "schedule.h"

namespace effkern::sliced_conv {

using device::entry_of;
using device::Shared;

constexpr int kScheduleThreads = 256, kScheduleWarps = kScheduleThreads / 32;
constexpr int kScheduleShared = kScheduleWarps * 8 + kScheduleWarps * 4;  // bytes

// The largest value of all threads. Between two calls lie other barriers, so none keeps the places from being written
// again.
__device__ __forceinline__ uint64_t largest(uint64_t value, Shared<uint64_t> of_warps) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    const uint64_t other = static_cast<uint64_t>(device::shuffle_xor(static_cast<uint32_t>(value >> 32), bits)) << 32 |
                           device::shuffle_xor(static_cast<uint32_t>(value), bits);
    if (other > value) value = other;
  }
  if (device::lane() == 0) device::store(of_warps + device::thread() / 32, value);
  device::sync();
  for (int w = 0; w < kScheduleWarps; ++w) {
    const uint64_t other = device::load<uint64_t>(of_warps + w);
    if (other > value) value = other;
  }
  return value;
}

// 0 is no sample's.
__device__ __forceinline__ uint64_t class_of(const Schedule& s, int32_t i) {
  if (i >= s.samples) return 0;
  const uint64_t c_out = static_cast<uint64_t>(entry_of(s.c_out, i, s.most_out));
  return (c_out << 32 | static_cast<uint32_t>(entry_of(s.c_in, i, s.most_in))) + 1;
}

__global__ void __launch_bounds__(kScheduleThreads) schedule(const __grid_constant__ Schedule s) {
  const Shared<uint64_t> of_warps = device::shared_memory().as<uint64_t>();
  const Shared<int32_t> counts = (device::shared_memory() + kScheduleWarps * 8).as<int32_t>();
  const int thread = device::thread(), lane = device::lane(), warp = thread / 32;
  uint64_t best = 0;
  for (int32_t i = thread; i < s.samples; i += kScheduleThreads) {
    const uint64_t mine = class_of(s, i);
    if (mine > best) best = mine;
    if (s.table_row) device::store(s.table_row + i, entry_of(s.table, i, s.most_row));
  }
  int32_t placed = 0, parts = 0;
  for (uint64_t now = largest(best, of_warps); now != 0; now = largest(best, of_warps)) {
    best = 0;
    const int32_t first = placed;
    for (int32_t start = 0; start < s.samples; start += kScheduleThreads) {
      const uint64_t mine = class_of(s, start + thread);
      if (mine < now && mine > best) best = mine;
      const uint32_t votes = device::ballot(mine == now);
      if (lane == 0) device::store(counts + warp, static_cast<int32_t>(device::popcount(votes)));
      device::sync();
      int32_t before = placed;
      for (int w = 0; w < kScheduleWarps; ++w) {
        const int32_t there = device::load<int32_t>(counts + w);
        if (w < warp) before += there;
        placed += there;
      }
      if (mine == now)
        device::store(s.order + (before + device::popcount(votes & ((1u << lane) - 1u))), start + thread);
      device::sync();  // the counts are written again in the next round
    }
    if (thread == 0) {
      const uint64_t widths = now - 1;
      device::store(s.parts + parts, Part{static_cast<int32_t>(widths & 0xffffffffu),
                                          static_cast<int32_t>(widths >> 32), first, placed - first});
    }
    ++parts;
  }
  if (thread == 0) device::store(s.part_count, parts);
}

}  // namespace effkern::sliced_conv
