// A warp's products on tensor cores, once what it multiplies lies in registers.
#pragma once

#include "../common/cuda/device.cuh"
#include "conv_gpu.h"

namespace effkern::conv::gpu {

// sum += a * b: a tile of 16x8, one step of K.
template <Math kMath>
__device__ __forceinline__ void multiply_fragment(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kMath == Math::F16)
    device::mma_f16(sum, a, b);
  else if constexpr (kMath == Math::BF16)
    device::mma_bf16(sum, a, b);
  else
    device::mma_tf32(sum, a, b);
}

}  // namespace effkern::conv::gpu
