// The tiles the convolution is compiled for: what is launched, what the tests run and what the static checks read.
// Large: 128 x 64 outputs (128 x 128 lost to it wherever an H100 ran both). Narrow: 128 x 32, for layers of few
// outputs. Small: 64 x 64, for few pixels. Tiny: 32 x 32, for fewer still, where what a turn waits for counts and not
// its products. Unaligned: for whatever allows no 16-byte copies. Registers are bounded so that a multiprocessor with
// the shared memory for it holds two blocks or more and nothing spills.
#pragma once

#include "conv.cuh"

namespace effkern::conv::gpu {

template <Math kMath, class T>
using Large = Config<kMath, T, 128, 64, 64, 32, 3, 2, kMath == Math::F32 ? 2 : 3, true>;
template <Math kMath, class T>
using Narrow = Config<kMath, T, 128, 32, 32, 32, 3, 2, 2, true>;
template <Math kMath, class T>
using Small = Config<kMath, T, 64, 64, 32, 32, 3, 2, kMath == Math::F32 ? 2 : 3, true>;
template <Math kMath, class T>
using Tiny = Config<kMath, T, 32, 32, 16, 16, 4, 2, kMath == Math::F32 ? 3 : 4, true>;
template <Math kMath, class T>
using Unaligned = Config<kMath, T, 64, 64, 32, 32, 2, 1, 2, false>;

}  // namespace effkern::conv::gpu
