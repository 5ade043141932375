// The inner loops of the depthwise convolution, one table per instruction set. Channels are lanes where they lie side
// by side in memory, pixels are lanes where the pixels of a channel do.
#pragma once

#include <cstdint>

#include "../common/cpu.h"
#include "problem.h"

namespace effkern::conv {

// The part of the epilogue that is one formula for every activation but two: min(max(acc * scale + shift + residual,
// low), high), NaN passing through.
struct DepthwiseEpilogue {
  Act act;
  float low, high;
};

DepthwiseEpilogue depthwise_epilogue(Act act);

inline bool is_curve(Act act) { return act == Act::Hardswish || act == Act::Silu; }

// `tiles` tiles, one behind the other, of the same outputs relative to their first pixel. Pointers are to the first
// channel of the block; no channel past `channels` is read or written.
struct DepthwiseTiles {
  // [input row][input column] of the first tile, or [tap][output column] where the kernel has no shape of its own.
  const float* const* in;
  float* const* out;             // [output row][output column] of the first tile
  const float* const* residual;  // as out, or null
  int64_t tiles;
  int64_t in_step, out_step, residual_step;  // floats from one tile to the next
  int64_t channels;
  const float* weight;  // [tap][tap_stride]
  int64_t taps, tap_stride;
  const float *scale, *shift;  // [channels], never null
  DepthwiseEpilogue epilogue;
};

using DepthwiseKernel = void (*)(const DepthwiseTiles&);

// A strip of up to 4 rows of outputs of a 3x3 kernel, `columns` wide. Pointers are to the first channel of the block;
// no channel past `channels` and no column outside of the map is read.
struct DepthwiseSweep {
  const float* in[7];  // the strip's input rows, column 0; a row in the padding is a pixel of zeros and has step 0
  int64_t in_step[7];  // floats from one column to the next
  int64_t first;       // input column of the first output's first tap, not below stride - 3; may be negative
  int64_t width;       // columns of the input
  int64_t columns;     // columns of outputs
  float* out;          // the first output
  int64_t out_row, out_step;
  const float* residual;  // as out, or null
  int64_t residual_row, residual_step;
  int64_t channels;
  const float* weight;  // [tap][tap_stride]
  int64_t tap_stride;
  const float *scale, *shift;  // [channels]; scale may be null
  DepthwiseEpilogue epilogue;  // applied but for the activations that are no clamp
  const char* ahead;           // what the next strips read, to be fetched into the L2 cache meanwhile, or null
  bool stream;                 // writes past the caches: out and its steps are whole cache lines
};

using DepthwiseSweepKernel = void (*)(const DepthwiseSweep&);
constexpr int64_t kSweepRows[] = {4, 3};  // at most, by stride: its inputs and weights fill 32 registers

// Widths of a tile, widest first: a row of outputs is cut greedily. 7 divides the maps of ImageNet networks.
constexpr int64_t kDepthwiseCols[] = {7, 4, 2, 1};
constexpr int64_t kDepthwiseWidths = 4, kDepthwiseMaxCols = 7, kDepthwiseRows = 2;

// One channel of a band of output rows, pixels in lanes. Every tap reads `x` at one offset: the caller laid the input
// out so (see depthwise_planes.cpp).
struct DepthwiseFlat {
  const float* x;
  const int64_t* offset;  // [taps], floats
  const float* weight;    // of tap t at t * tap_stride
  int64_t taps, tap_stride;
  float scale, shift;
  const float* residual;  // [length], or null
  float* out;             // [length]
  int64_t length;         // rounded up to whole vectors of kFlatLanes: x, residual and out have that room
  DepthwiseEpilogue epilogue;
};
constexpr int64_t kFlatLanes = 16;

struct DepthwiseKernels {
  // [stride 1 or 2][rows - 1], null where the set has too few registers: 3x3 kernels are then done by tiles.
  DepthwiseSweepKernel sweep[2][4];
  // [kernel 3 or 5][stride 1 or 2][rows 1 or 2][width]
  DepthwiseKernel tile[2][2][kDepthwiseRows][kDepthwiseWidths];
  // Any kernel, stride and dilation, one row of outputs.
  DepthwiseKernel any[kDepthwiseWidths];
  void (*flat)(const DepthwiseFlat&);
  void (*curve)(float* data, int64_t n, Act act);  // an activation that is no clamp, in place
  void (*fence)();  // orders what was streamed before what this thread writes next; null where `sweep` is
  // Copies rows of n floats, and of every other of 2 n - 1 floats.
  void (*copy)(float* to, int64_t to_pitch, const float* from, int64_t from_pitch, int64_t rows, int64_t n);
  void (*evens)(float* to, int64_t to_pitch, const float* from, int64_t from_pitch, int64_t rows, int64_t n);
};

const DepthwiseKernels& depthwise_kernels(Isa isa);

namespace scalar {
extern const DepthwiseKernels depthwise_table;
}
namespace avx2 {
extern const DepthwiseKernels depthwise_table;
}
namespace avx512 {
extern const DepthwiseKernels depthwise_table;
}

}  // namespace effkern::conv
