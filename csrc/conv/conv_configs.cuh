// The tiles the convolution is compiled for: what is launched, what the tests run and what the static checks read.
// Large: 128 x 128 outputs, or 128 x 64 where operands have 32 bits and fragments take twice the registers. Narrow: 128
// x 32, for layers of few outputs. Small: 64 x 64, for few pixels. Unaligned: for whatever allows no 16-byte copies.
// Shared memory is chosen so that parts with 100 KiB a multiprocessor hold two blocks, registers so that nothing
// spills.
#pragma once

#include "conv.cuh"

namespace effkern::conv::gpu {

template <Math kMath, class T>
using Large = std::conditional_t<sizeof(T) == 2, Config<kMath, T, 128, 128, 64, 64, 3, 2, true>,
                                 Config<kMath, T, 128, 64, 64, 32, 3, kMath == Math::TF32 ? 3 : 2, true>>;
template <Math kMath, class T>
using Narrow = Config<kMath, T, 128, 32, 32, 32, 4, 2, true>;
template <Math kMath, class T>
using Small = Config<kMath, T, 64, 64, 32, 32, 4, 3, true>;
template <Math kMath, class T>
using Unaligned = Config<kMath, T, 64, 64, 32, 32, 2, 2, false>;

}  // namespace effkern::conv::gpu
