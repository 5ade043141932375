// From a problem to a launch of the weight's gradient. Included by the files of one storage type.
#pragma once

#include "../common/cuda/launch.cuh"
#include "wgrad.cuh"
#include "wgrad_gpu_plan.h"

namespace effkern::conv::gpu {

template <class C>
void launch_wgrad(const Wgrad<typename C::T>& p, device::Stream stream) {
  const int64_t blocks = int64_t{wgrad_tiles<C>(p)} * p.slices.count;
  EFFKERN_CHECK_VALUE(blocks <= INT32_MAX, "wgrad: the weight is too large: ", blocks, " tiles");
  device::launch("wgrad", wgrad_kernel<C>, static_cast<unsigned>(blocks), C::kThreads, C::kShared, stream, p);
}

template <Math kMath, class T, bool kListed>
void run_wgrad_as(const Wgrad<T>& p, device::Stream stream) {
  switch (wgrad_plan(p, p.slices.rows).choice) {
    case WgradChoice::Large:
      return launch_wgrad<WgradLarge<kMath, T, kListed>>(p, stream);
    case WgradChoice::Small:
      return launch_wgrad<WgradSmall<kMath, T, kListed>>(p, stream);
    case WgradChoice::Unaligned:
      return launch_wgrad<WgradUnaligned<kMath, T, kListed>>(p, stream);
  }
}

template <Math kMath, class T>
void run_wgrad(const Wgrad<T>& p, device::Stream stream) {
  if (p.rows)
    run_wgrad_as<kMath, T, true>(p, stream);
  else
    run_wgrad_as<kMath, T, false>(p, stream);
}

}  // namespace effkern::conv::gpu
