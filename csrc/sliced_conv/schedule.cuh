// Sorts the samples of a ragged batch into classes of equal widths, without a trip to the host: one thread block, which
// takes the widest class first (its tiles take longest), so that the order is the same in every run. Each pass over the
// samples appends one class to the list, in ascending order of its samples, and finds the next one, with one barrier.
// Traffic: the widths once (see schedule_work), the list and the parts once.
#pragma once

#include "../common/cuda/indices.cuh"
#include "schedule.h"

namespace effkern::sliced_conv {

using device::entry_of;
using device::Shared;
using device::Vec;

constexpr int kMostScheduleWarps = kMostScheduleThreads / 32;
constexpr int kScheduleShared = 2 * kMostScheduleWarps * 16;  // bytes

// The largest value of the lanes, for each of them.
__device__ __forceinline__ uint64_t largest(uint64_t value) {
  const uint32_t high = device::reduce_max(static_cast<uint32_t>(value >> 32));
  const uint32_t low = device::reduce_max(value >> 32 == high ? static_cast<uint32_t>(value) : 0u);
  return static_cast<uint64_t>(high) << 32 | low;
}

// 0 is no sample's.
__device__ __forceinline__ uint64_t class_of(const Schedule& s, int32_t i) {
  if (i >= s.samples) return 0;
  const uint64_t c_out = static_cast<uint64_t>(entry_of(s.c_out, i, s.most_out));
  return (c_out << 32 | static_cast<uint32_t>(entry_of(s.c_in, i, s.most_in))) + 1;
}

__global__ void __launch_bounds__(kMostScheduleThreads) schedule(const __grid_constant__ Schedule s) {
  // What each warp found: members of the class, and the next class. In turns, so that one barrier a turn will do: who
  // writes again has passed the barrier behind which the others have read.
  const Shared<Vec<uint32_t, 4>> found = device::shared_memory().as<Vec<uint32_t, 4>>();
  const int lane = device::lane(), warp = device::thread() / 32;
  const int32_t threads = schedule_threads(s.samples);
  const int32_t each = s.samples <= threads ? 1 : kHeldSamples;  // samples of a thread at once
  const bool held_all = s.samples <= threads * each;
  constexpr uint64_t kNone = ~uint64_t{0};  // the class of the first pass, which appends none
  uint64_t now = kNone, held[kHeldSamples] = {};
  int32_t placed = 0, parts = 0, turn = 0;
  do {
    const int32_t first = placed;
    uint64_t next = 0;
    for (int32_t start = 0; start < s.samples; start += threads * each) {
      const int32_t mine = start + warp * (32 * each) + lane;  // and every 32nd from there
      if (now == kNone || !held_all) {
#pragma unroll
        for (int r = 0; r < kHeldSamples; ++r) {
          if (r >= each) break;
          held[r] = class_of(s, mine + 32 * r);
          if (now == kNone && s.table_row && mine + 32 * r < s.samples)
            device::store(s.table_row + (mine + 32 * r), entry_of(s.table, mine + 32 * r, s.most_row));
        }
      }
      uint64_t best = 0;
      uint32_t votes[kHeldSamples] = {}, count = 0;
#pragma unroll
      for (int r = 0; r < kHeldSamples; ++r) {
        if (r >= each) break;
        votes[r] = device::ballot(held[r] == now);
        count += static_cast<uint32_t>(device::popcount(votes[r]));
        if (held[r] < now && held[r] > best) best = held[r];
      }
      best = largest(best);
      const Shared<Vec<uint32_t, 4>> of_turn = found + turn % 2 * kMostScheduleWarps;
      if (lane == 0)
        device::store(of_turn + warp,
                      Vec<uint32_t, 4>{{count, static_cast<uint32_t>(best), static_cast<uint32_t>(best >> 32), 0}});
      device::sync();  // what the warps found is there
      ++turn;
      Vec<uint32_t, 4> theirs{};
      if (lane < threads / 32) theirs = device::load<Vec<uint32_t, 4>>(of_turn + lane);
      best = largest(static_cast<uint64_t>(theirs.v[2]) << 32 | theirs.v[1]);
      if (best > next) next = best;
      int32_t at = placed + static_cast<int32_t>(device::reduce_add(lane < warp ? theirs.v[0] : 0u));
      placed += static_cast<int32_t>(device::reduce_add(theirs.v[0]));
#pragma unroll
      for (int r = 0; r < kHeldSamples; ++r) {
        if (r >= each) break;
        if (held[r] == now)
          device::store(s.order + (at + device::popcount(votes[r] & ((1u << lane) - 1u))), mine + 32 * r);
        at += device::popcount(votes[r]);
      }
    }
    if (now != kNone) {
      const uint64_t widths = now - 1;
      if (device::thread() == 0)
        device::store(s.parts + parts, Part{static_cast<int32_t>(widths & 0xffffffffu),
                                            static_cast<int32_t>(widths >> 32), first, placed - first});
      ++parts;
    }
    now = next;
  } while (now != 0);
  if (device::thread() == 0) device::store(s.part_count, parts);
}

}  // namespace effkern::sliced_conv
