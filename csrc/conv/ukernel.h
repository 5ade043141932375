// The inner loops, one table per instruction set. The tile computes 16 outputs of up to `rows` pixels.
#pragma once

#include <cstdint>

#include "../common/cpu.h"
#include "problem.h"

namespace effkern::conv {

constexpr int64_t kMaxRows = 12;
constexpr int64_t kMaxStore = 16;  // pixels one store may take: a Winograd tile of 4x4

// Where a finished tile goes. Everything is already offset to the tile's first output channel.
struct Store {
  int64_t rows, cols;  // cols in 1..16
  bool one_table;      // scale[0] and shift[0] serve all rows
  void* y[kMaxStore];
  const void* residual[kMaxStore];
  const float* scale[kMaxStore];  // null: 1
  const float* shift[kMaxStore];  // null: 0
  DType y_dtype, residual_dtype;
  int64_t y_sc, residual_sc;
  bool has_residual;
  Act act;
};

// A tile of indirect GEMM and its store: sums of up to GemmKernels::rows pixels x 16 outputs a panel over taps t, then
// k, of a[t * rows + r][a_offset + k] * b[t * tap_stride + k * 16 + (0..16)], in this order whatever the tile. A long
// sum is cut and goes on in `sums`; with the last part the outputs are stored, fp32 and side by side.
constexpr int64_t kMaxCols = 2 * kPanel;
struct GemmTile {
  int64_t rows;
  const float* const* a;  // has the table's full row pitch whatever `rows` is
  int64_t a_offset, taps, k;
  const float* b;
  int64_t tap_stride, panel_stride;  // floats from a tap to the next, and from the first panel to the second
  const float* ahead;                // weights that lie as those of a panel at b, fetched into the L2 cache meanwhile
  float* sums;                       // [rows][kMaxCols]; read if `more`, written unless `last`, overwritten in any case
  bool more, last;
  bool fetch;    // with the last part: what the store reads and writes is not in L2
  int64_t cols;  // how many outputs are stored: up to 16 a panel
  // Read if `last`:
  void* const* y;               // of each row, `y_offset` floats before the first output
  const void* const* residual;  // the same, or null
  int64_t y_offset, residual_offset;
  const float *scale, *shift;  // [kMaxCols], of the tile's channels
  float low, high;             // none, relu and relu6 are a clamp
  bool curved;                 // `act` is none of those
  Act act;
};

struct GemmKernels {
  int64_t rows, panels;  // of a full tile
  void (*tile)(const GemmTile& tile);
};

// An input tile for Winograd's transform: pixel (i, j) lies at x[i * row_pitch + j * pixel_pitch], channels side by
// side. Only rows [y0, y1) and columns [x0, x1) are inside the image; the others are zeros and never read.
struct InputTile {
  const float* x;
  int64_t row_pitch, pixel_pitch;
  int64_t y0, y1, x0, x1;
};

// What a side of a map is cut into: tiles of F's `out` outputs and, where F has such, a shorter one at the end, which
// needs only some of a whole tile's values.
struct WinogradPiece {
  int out, side;  // outputs and inputs of the tile's side
  bool has[8];    // the values of a whole tile's side that it has
};
constexpr int kPieces = 3;  // whole tiles, and the shorter ones in ascending order

// The transforms of F(m x m, 3 x 3); values (i, j) of a tile are numbered i * side + j, also in a shorter tile.
struct WinogradKernels {
  int out, side;               // of a whole tile: outputs and inputs
  int weight_side, pairs;      // rows of transformed weights, which are made two at a time
  const int (*weight_row)[2];  // the rows of each pair; weight_side stands for none
  const int* weight_of;        // value (i, j) is multiplied with transformed weight (weight_of[i], weight_of[j])
  // Weights that are no more than a tap: values of row r and column c, where both have one, are multiplied with tap
  // (tap_line[r], tap_line[c]) as it lies in the pack, and `weight` leaves them out. -1 stands for none.
  const int* tap_line;
  int tap_of(int64_t row, int64_t column) const {
    return tap_line[row] < 0 || tap_line[column] < 0 ? -1 : 3 * tap_line[row] + tap_line[column];
  }
  WinogradPiece piece[kPieces];
  // The piece that does `left` outputs at the end of a side: 0, a whole tile cut short, where no shorter one does.
  int piece_of(int64_t left) const {
    for (int i = 1; i < kPieces && left > 0; ++i)
      if (piece[i].out < out && left <= piece[i].out) return i;
    return 0;
  }
  // Rows weight_row[pair] of the weight transforms of a panel [tap][channel][16]: (weight_row[pair][r], j) of a channel
  // lies at u[(r * weight_side + j) * plane + channel * 16 + (0..16)].
  void (*weight)(int64_t pair, const float* panel, int64_t tap_stride, int64_t channels, float* u, int64_t plane);
  // By the pieces down and across. v[value * plane + channel] for one tile and all channels:
  void (*input[kPieces][kPieces])(const InputTile& tile, int64_t channels, float* v, int64_t plane);
  // c[(i * piece[across].out + j) * 16 + (0..16)] from the products m[value * plane + (0..16)].
  void (*output[kPieces][kPieces])(const float* m, int64_t plane, float* c);
};

struct Kernels {
  int64_t rows;  // pixels per full tile, at most kMaxRows
  // c[r][0..16) = (more ? c[r][0..16) : 0) + sum over taps t, then k, of a[t * rows + r][k] * b[t * tap_stride + k * 16
  // + (0..16)], r < n. `a` has the table's full row pitch even when n < rows. One accumulator per element, so the order
  // of the sum is the same for every n.
  void (*tile)(int64_t n, const float* const* a, int64_t a_offset, int64_t taps, int64_t k, const float* b,
               int64_t tap_stride, bool more, float* c);
  GemmKernels gemm;
  void (*store)(const Store& where, const float* c);
  WinogradKernels f23, f33, f43;  // f33 is of stride 2
  const WinogradKernels& winograd(int64_t m) const { return m == 2 ? f23 : m == 3 ? f33 : f43; }
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
