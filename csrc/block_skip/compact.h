// What compact (compact.cuh) is given.
#pragma once

#include "../common/cuda/device.cuh"
#include "../common/cuda/stream.h"

namespace effkern::block_skip {

struct Compaction {
  device::Global<const char> keep;
  int size;             // bytes of an entry
  bool signed_entries;  // floating: the sign is no value, so -0.0 is dropped
  int64_t n, columns, row_stride, column_stride;
  device::Global<int32_t> idx, count;  // [columns][n], [columns]
  bool rest;                           // what follows the kept rows: the dropped ones, from the last one on, or -1
};

// Bytes that the kernel's instructions move: the mask once, the list once.
struct CompactWork {
  int64_t bytes_keep, bytes_lists;
};
inline CompactWork compact_work(int64_t n, int64_t columns, int64_t size) {
  return {n * columns * size, (n + 1) * columns * 4};
}

void run(const Compaction& compaction, device::Stream stream);  // one launch

}  // namespace effkern::block_skip
