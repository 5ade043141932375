// The inner loops, one table per instruction set. The tile computes 16 outputs of up to `rows` pixels.
#pragma once

#include <cstdint>

#include "../common/cpu.h"
#include "problem.h"

namespace effkern::conv {

constexpr int64_t kMaxRows = 12;

// Where a finished tile goes. Everything is already offset to the tile's first output channel.
struct Store {
  int64_t rows, cols;  // cols in 1..16
  void* y[kMaxRows];
  const void* residual[kMaxRows];
  const float* scale[kMaxRows];  // null: 1
  const float* shift[kMaxRows];  // null: 0
  DType y_dtype, residual_dtype;
  int64_t y_sc, residual_sc;
  bool has_residual;
  Act act;
};

struct Kernels {
  int64_t rows;  // pixels per full tile, at most kMaxRows
  // c[r][0..16) = sum over taps t, then k, of a[t * rows + r][k] * b[t * tap_stride + k * 16 + (0..16)], r < n.
  // `a` has the table's full row pitch even when n < rows. One accumulator per element, so the order of the sum is the
  // same for every n.
  void (*tile)(int64_t n, const float* const* a, int64_t a_offset, int64_t taps, int64_t k, const float* b,
               int64_t tap_stride, float* c);
  // c[r][0..cols) = sum over taps of a[t * rows + r][a_offset + col] * w[t * tap_stride + col]. Reads no column past
  // cols.
  void (*depthwise)(int64_t n, const float* const* a, int64_t a_offset, int64_t cols, int64_t taps, const float* w,
                    int64_t tap_stride, float* c);
  void (*store)(const Store& where, const float* c);
};

const Kernels& kernels(Isa isa);

namespace scalar {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
extern const Kernels table16;  // the 16-lane code of avx512 on 8-lane registers, for tests on narrower machines
}  // namespace avx2
namespace avx512 {
extern const Kernels table;
}

}  // namespace effkern::conv
