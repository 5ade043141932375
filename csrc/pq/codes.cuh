// Reading codes in kernels.
#pragma once

#include "codes_gpu.h"

namespace effkern::pq {

// Entries first + i[n] of the codes, all loads at once, held to the entries there are: kernels must not leave the book,
// whatever is in the tensor.
template <int kN>
__device__ __forceinline__ void codes_at(const Codes& codes, int64_t first, const int32_t (&i)[kN], int32_t (&to)[kN]) {
  if (codes.bytes == 1) {
#pragma unroll
    for (int n = 0; n < kN; ++n) to[n] = device::load<uint8_t>(codes.p.as<const uint8_t>() + first + i[n]);
  } else if (codes.bytes == 4) {
#pragma unroll
    for (int n = 0; n < kN; ++n) to[n] = device::load<int32_t>(codes.p.as<const int32_t>() + first + i[n]);
  } else if (codes.has_sign) {
#pragma unroll
    for (int n = 0; n < kN; ++n) to[n] = device::load<int16_t>(codes.p.as<const int16_t>() + first + i[n]);
  } else {
#pragma unroll
    for (int n = 0; n < kN; ++n) to[n] = device::load<uint16_t>(codes.p.as<const uint16_t>() + first + i[n]);
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) to[n] = to[n] < 0 ? 0 : to[n] >= codes.entries ? codes.entries - 1 : to[n];
}

__device__ __forceinline__ int32_t code_at(const Codes& codes, int64_t i) {
  const int32_t here[1] = {0};
  int32_t code[1];
  codes_at(codes, i, here, code);
  return code[0];
}

}  // namespace effkern::pq
