// What each launch of the small kernels of a convolution's gradients costs, from shapes alone: the bytes its
// instructions read from and write to global memory, caches included. The tests hold the harness's counters to it.
#pragma once

#include "../common/cuda/traffic.h"
#include "wgrad_model.h"

namespace effkern::conv::gpu {

using device::Traffic;

template <class T>
Traffic act_grad_work(const ActGrad<T>& p) {
  const int64_t map = int64_t{p.slices.rows} * p.channels * static_cast<int64_t>(sizeof(T));
  const int64_t sums = p.sums ? int64_t{p.slices.count} * p.channels * 4 : 0;
  return {map * (p.y.at ? 2 : 1), (p.gz.at ? map : 0) + sums};
}

template <class T>
Traffic transpose_work(const Transpose<T>& p) {
  const int64_t weight = int64_t{p.groups} * p.c_out * p.c_in * p.kernel.h * p.kernel.w;
  return {weight * static_cast<int64_t>(sizeof(T)), weight * static_cast<int64_t>(sizeof(T))};
}

// Sums of the running part; the columns that fill a tap's last chunk are not read.
template <class T>
Traffic fold_work(const Fold<T>& p) {
  const int64_t ran = int64_t{p.groups} * p.c_out * p.c_in * p.taps;
  return {ran * p.slices * 4, p.elements * static_cast<int64_t>(sizeof(T))};
}

inline Traffic fold_sums_work(const FoldSums& p) { return {int64_t{p.slices} * p.size * 4, int64_t{p.size} * 4}; }

// gz once for every `at_once` taps, x once a tap that falls inside the map.
template <class T>
Traffic depthwise_wgrad_work(const Wgrad<T>& p, int64_t at_once) {
  constexpr int64_t size = sizeof(T);
  const int64_t taps = int64_t{p.kernel.h} * p.kernel.w, maps = p.slices.rows / (int64_t{p.out.h} * p.out.w);
  const int64_t inside = taps_inside(p.out.h, p.in.h, p.kernel.h, p.stride.h, p.pad.h, p.dilation.h) *
                         taps_inside(p.out.w, p.in.w, p.kernel.w, p.stride.w, p.pad.w, p.dilation.w);
  const int64_t gz = (taps + at_once - 1) / at_once * p.slices.rows;
  return {(gz + maps * inside) * p.groups * size, int64_t{p.slices.count} * p.groups * taps * 4};
}

}  // namespace effkern::conv::gpu
