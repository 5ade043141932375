// Reading lists of integers in kernels.
#pragma once

#include "indices.h"

namespace effkern::device {

// Entry i, held to [0, most]: kernels must not leave their memory, whatever is in the tensor.
__device__ __forceinline__ int32_t entry_of(const Indices& list, int32_t i, int32_t most) {
  if (!list.words) return 0;
  const int32_t low = load<int32_t>(list.words + i * list.stride);
  const int32_t high = list.wide ? load<int32_t>(list.words + (i * list.stride + 1)) : low < 0 ? -1 : 0;
  if (high < 0) return 0;
  return high > 0 || low < 0 || low > most ? most : low;
}

}  // namespace effkern::device
