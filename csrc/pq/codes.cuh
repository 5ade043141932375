// Reading codes in kernels.
#pragma once

#include "codes_gpu.h"

namespace effkern::pq {

// Entry i of the codes, held to the entries there are: kernels must not leave the book, whatever is in the tensor.
__device__ __forceinline__ int32_t code_at(const Codes& codes, int64_t i) {
  int32_t code;
  if (codes.bytes == 1)
    code = device::load<uint8_t>(codes.p.as<const uint8_t>() + i);
  else if (codes.bytes == 4)
    code = device::load<int32_t>(codes.p.as<const int32_t>() + i);
  else if (codes.has_sign)
    code = device::load<int16_t>(codes.p.as<const int16_t>() + i);
  else
    code = device::load<uint16_t>(codes.p.as<const uint16_t>() + i);
  return code < 0 ? 0 : code >= codes.entries ? codes.entries - 1 : code;
}

}  // namespace effkern::pq
