// Slopes of the epilogue's activations in kernels of gradients.
#pragma once

#include "../conv/conv_gpu.h"

namespace effkern::conv::gpu {

// Gradient at the activation's input from that at its output. `seen` is the input, or for relu and relu6 the output. As
// in torch a NaN lets the gradient through, and where the slope is 0 the result is, whatever the gradient was.
__device__ __forceinline__ float through(float gradient, float seen, Act act) {
  switch (act) {
    case Act::Relu:
      return seen <= 0.0f ? 0.0f : gradient;
    case Act::Relu6:
      return seen <= 0.0f || seen >= 6.0f ? 0.0f : gradient;
    case Act::Hardswish:
      return gradient * (seen < -3.0f ? 0.0f : seen <= 3.0f ? device::fma(seen, 1.0f / 3.0f, 0.5f) : 1.0f);
    case Act::Silu: {
      const float gate = 1.0f / (1.0f + device::exp(-seen));
      return gradient * (gate * device::fma(seen, 1.0f - gate, 1.0f));
    }
    default:
      return gradient;
  }
}

}  // namespace effkern::conv::gpu
