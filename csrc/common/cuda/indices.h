// Lists of integers as ops are given them: int32 or int64, any stride.
#pragma once

#include "device.cuh"

namespace effkern::device {

struct Indices {
  Global<const int32_t> words;  // null: all entries 0
  int64_t stride;               // words of 32 bits from entry to entry
  bool wide;                    // int64
};

}  // namespace effkern::device
