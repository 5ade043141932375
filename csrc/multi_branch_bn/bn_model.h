// What each launch of the batch norms' kernels costs, from shapes alone: the bytes its instructions read from and write
// to global memory, caches included. The tests hold the harness's counters to it. Maps dominate; vectors of channels
// are read again by every block, from a cache.
#pragma once

#include "../common/cuda/traffic.h"
#include "bn_gpu.h"

namespace effkern::multi_branch_bn::gpu {

using device::Traffic;

template <class T>
int64_t map_bytes(const Maps<T>& maps) {
  return int64_t{maps.slices.rows} * maps.channels * static_cast<int64_t>(sizeof(T));
}

template <class T>
Traffic statistics_work(const Statistics<T>& p) {
  const int64_t parts = int64_t{2} * p.maps.count * p.maps.slices.count * p.maps.channels;
  return {p.maps.count * map_bytes(p.maps), parts * 4};
}

inline Traffic finish_work(const Finish& p) {
  const int64_t table = int64_t{p.count} * p.channels;  // elements
  const int64_t sums = p.parts ? 3 * table * p.slices.count : 0, running = !p.parts || p.new_mean ? 2 * table : 0;
  const int64_t doubles = 2 * table, floats = table + p.channels + (p.new_mean ? 2 * table : 0);
  return {(sums + running + 2 * table) * 4, doubles * 8 + floats * 4};
}

// Every lane of a block reads its channels' factors.
template <class T>
Traffic apply_work(const Apply<T>& p) {
  const int64_t factors = int64_t{p.maps.slices.count} * device::kColumnLanes * p.maps.channels * (1 + p.maps.count);
  return {p.maps.count * map_bytes(p.maps) + factors * 4, map_bytes(p.maps)};
}

// Of what a block makes the affine form from: mean and invstd in fp64, weight and bias.
template <class T>
int64_t vector_bytes(const Gradient<T>& p) {
  return int64_t{p.maps.slices.count} * p.maps.count * p.maps.channels * (2 * 8 + 2 * 4);
}

template <class T>
Traffic gradient_sums_work(const GradientSums<T>& p) {
  const Maps<T>& maps = p.of.maps;
  return {(1 + maps.count) * map_bytes(maps) + vector_bytes(p.of),
          int64_t{maps.slices.count} * (1 + maps.count) * maps.channels * 4};
}

inline Traffic gradient_finish_work(const GradientFinish& p) {
  const int64_t table = int64_t{p.count} * p.channels, sums = int64_t{p.slices.count} * (1 + p.count) * p.channels;
  return {sums * 4 + table * (2 * 8 + 4), (3 * table + p.channels) * 4};
}

template <class T>
Traffic gradient_apply_work(const GradientApply<T>& p) {
  const Maps<T>& maps = p.of.maps;
  int64_t wanted = 0;
  for (int32_t i = 0; i < maps.count; ++i) wanted += p.dx[i].at ? 1 : 0;
  const int64_t factors = int64_t{2} * maps.slices.count * maps.count * maps.channels;  // slope, offset
  return {(1 + maps.count) * map_bytes(maps) + vector_bytes(p.of) + factors * 4, wanted * map_bytes(maps)};
}

}  // namespace effkern::multi_branch_bn::gpu
