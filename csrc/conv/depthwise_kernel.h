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
  // [kernel 3 or 5][stride 1 or 2][rows 1 or 2][width]
  DepthwiseKernel tile[2][2][kDepthwiseRows][kDepthwiseWidths];
  // Any kernel, stride and dilation, one row of outputs.
  DepthwiseKernel any[kDepthwiseWidths];
  void (*flat)(const DepthwiseFlat&);
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
