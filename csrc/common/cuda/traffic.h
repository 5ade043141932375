// What a launch moves, as the kernels' models tell it.
#pragma once

#include <cstdint>

namespace effkern::device {

// Bytes between global memory, caches included, and registers or shared memory.
struct Traffic {
  int64_t read = 0, written = 0;
};

}  // namespace effkern::device
