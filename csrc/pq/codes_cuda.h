// Codes and codebook of an op on CUDA, checked. Codes never come to the host, so the kernels hold to the book what the
// CPU refuses.
#pragma once

#include "../common/cuda/arguments.h"
#include "codes_gpu.h"

namespace effkern::pq {

struct Coded {
  Tensor codes, book;  // dense
  int64_t rows, positions, stages, entries, d;
  bool book_per_position, book_per_stage;

  Codes as_codes(const device::Scope& scope) const;
};

// columns: numbers in a weight row, or -1 if any length will do. x: whose device they must be on.
Coded coded(const Tensor& codes, const Tensor& codebook, int64_t columns, const Tensor& x, const char* op);

}  // namespace effkern::pq
