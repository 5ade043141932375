// From a problem to a launch: the tile, the grid, the checks. Included by the files of one storage type.
#pragma once

#include <cstdint>
#ifdef EFFKERN_TUNING
#include <cstdlib>
#include <cstring>
#endif

#include "../common/cuda/launch.cuh"
#include "conv_configs.cuh"
#include "conv_cuda.h"
#include "conv_gpu_plan.h"
#include "problem.h"

namespace effkern::conv::gpu {

static_assert(static_cast<int>(Act::Silu) == static_cast<int>(conv::Act::Silu) &&
              static_cast<int>(Act::Hardswish) == static_cast<int>(conv::Act::Hardswish) &&
              static_cast<int>(Act::Relu6) == static_cast<int>(conv::Act::Relu6));

template <class C>
void launch_tiles(const Problem<typename C::T>& p, device::Stream stream) {
  const int64_t tiles = most_tiles(p, C::kTileM, C::kTileN);
  const unsigned resident = device::resident_blocks("conv", conv_kernel<C>, C::kThreads, kSharedBytes<C>);
  const unsigned grid = tiles < resident ? static_cast<unsigned>(tiles) : resident;
  device::launch("conv", conv_kernel<C>, grid, C::kThreads, kSharedBytes<C>, stream, p);
}

// What EFFKERN_CONV_TILE asks for, in builds for timing alone; tiles change no bit.
#ifdef EFFKERN_TUNING
inline Choice asked_for(Choice chosen) {
  const char* tile = std::getenv("EFFKERN_CONV_TILE");
  if (tile == nullptr || chosen == Choice::Unaligned) return chosen;
  if (std::strcmp(tile, "large") == 0) return Choice::Large;
  if (std::strcmp(tile, "narrow") == 0) return Choice::Narrow;
  if (std::strcmp(tile, "tiny") == 0) return Choice::Tiny;
  return std::strcmp(tile, "small") == 0 ? Choice::Small : chosen;
}
#else
inline Choice asked_for(Choice chosen) { return chosen; }
#endif

template <Math kMath, class T>
void run_as(Problem<T> p, device::Stream stream) {
  const int64_t pixels = static_cast<int64_t>(p.whole.count) * p.out.h * p.out.w;
  EFFKERN_CHECK_VALUE(pixels <= INT32_MAX, "conv: x must have at most 2^31 - 1 output pixels, got ", pixels);
  EFFKERN_CHECK_VALUE(p.kernel.h <= kMostTaps && p.kernel.w <= kMostTaps, "conv: the kernel must be at most ",
                      kMostTaps, " x ", kMostTaps, ", got ", p.kernel.h, " x ", p.kernel.w);
  EFFKERN_CHECK_VALUE(!p.parts || p.groups == 1, "conv: groups must be 1 with several widths, got ", p.groups);
  if (pixels == 0 || (p.whole.c_out == 0 && p.zero_to == 0)) return;
  set_widths(p);
  switch (asked_for(choose(p, kMath == Math::F32, device::processors("conv")))) {
    case Choice::Large:
      return launch_tiles<Large<kMath, T>>(p, stream);
    case Choice::Narrow:
      return launch_tiles<Narrow<kMath, T>>(p, stream);
    case Choice::Small:
      return launch_tiles<Small<kMath, T>>(p, stream);
    case Choice::Tiny:
      return launch_tiles<Tiny<kMath, T>>(p, stream);
    case Choice::Unaligned:
      return launch_tiles<Unaligned<kMath, T>>(p, stream);
  }
}

}  // namespace effkern::conv::gpu
