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

// Launches the decoder. y: rows of `taps` times `channels` numbers, dense, of the book's type.
void decode_into(const device::Scope& scope, const Coded& weight, const MaybeTensor& scale, int64_t taps,
                 int64_t channels, const Tensor& y);

// columns: numbers in a weight row, or -1 if any length will do. x: whose device they must be on.
Coded coded(const Tensor& codes, const Tensor& codebook, int64_t columns, const Tensor& x, const char* op);

}  // namespace effkern::pq
