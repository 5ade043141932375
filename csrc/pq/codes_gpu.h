// Codes as the GPU's kernels take them.
#pragma once

#include <cstdint>

#include "../common/cuda/device.cuh"

namespace effkern::pq {

using device::Global;

// Numbers of entries of a book, dense: uint8, int16, uint16 or int32. Those outside of [0, entries) are held to it.
struct Codes {
  Global<const char> p;
  int32_t bytes;
  bool has_sign;
  int32_t entries;
};

}  // namespace effkern::pq
