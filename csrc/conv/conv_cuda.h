// Runs a convolution on a CUDA stream. One translation unit a storage type (conv_f16.cu, conv_bf16.cu, conv_f32.cu).
#pragma once

#include "../common/cuda/stream.h"
#include "conv_gpu.h"

namespace effkern::conv::gpu {

// x, weight, y and lists are device memory of the current device; p.wide_y and p.wide_residual are set here. With
// parts, `whole` holds the most of each: channels, and count over all parts; at most kMostParts parts, and one group.
// Allocates nothing, waits for nothing, and launches one kernel whose grid depends on `whole` and the device alone.
// Throws ValueError for more than 2^31 - 1 output pixels or kernels above 32 taps a side, RuntimeError for a failed
// launch.
void run(Problem<device::F16> p, device::Stream stream);
void run(Problem<device::BF16> p, device::Stream stream);
void run(Problem<float> p, Math math, device::Stream stream);  // TF32 or F32

}  // namespace effkern::conv::gpu
