// Launching a kernel over pieces of samples' maps.
#pragma once

#include "columns.h"
#include "launch.cuh"

namespace effkern::device {

// T: of the maps' elements.
template <class T, class Arguments>
void launch_pieces(const char* name, void (*kernel)(Arguments), const Arguments& p, Stream stream) {
  const int64_t blocks = p.template blocks<T>();
  EFFKERN_CHECK_VALUE(blocks <= INT32_MAX, name, ": the batch is too large: ", blocks, " pieces");
  if (blocks > 0) launch(name, kernel, static_cast<unsigned>(blocks), kColumnThreads, kColumnShared, stream, p);
}

}  // namespace effkern::device
