// What the GPU's convolution is asked: the engine's question (problem.h) as a kernel takes it, with lists and counts in
// device memory, so that no launch waits for the host and every launch can be captured in a graph.
#pragma once

#include <cstdint>

#include "../common/cuda/device.cuh"

namespace effkern::conv::gpu {

using device::Global;

enum class Act : int { None, Relu, Relu6, Hardswish, Silu };  // conv::Act, which host code asserts

enum class Math { F16, BF16, TF32, F32 };  // of the products; sums are fp32 always

struct Size2 {
  int32_t h, w;
};
struct Strides {
  int64_t n, h, w;  // elements; channels are contiguous
};

// A set of samples that use the same prefix. The lists' entries first..first+count belong to it.
struct alignas(16) Part {
  int32_t c_in, c_out;  // a group
  int32_t first, count;
};

template <class T>
struct Problem {
  // Channels-last views. What is read must not be written by the launch: it goes through the read-only cache.
  Global<const T> x, weight, residual;  // residual may be null
  Global<T> y;
  Strides xs, rs, ys;
  // [groups][group_rows][kh * kw][tap pitch]: the whole weight; a prefix of rows and of a tap's channels is used in
  // place.
  int64_t weight_row, weight_tap;
  int32_t groups, group_rows;
  Size2 in, out, kernel, stride, pad, dilation;  // kernel: 32 x 32 at most, one bit a tap row and a tap column

  Part whole;                        // with `count` or `parts`: the most there can be of each
  Global<const int32_t> count;       // null: whole.count
  Global<const Part> parts;          // null: the one part `whole`
  Global<const int32_t> part_count;  // with parts
  // Entry i reads sample x_rows[i] of x and writes y_rows[i] of y; null: i.
  Global<const int32_t> x_rows, y_rows, residual_rows;
  // Outputs from c_out to this one become zeros, so that consumers need not know the width; 0: they are not touched.
  int32_t zero_to;

  // Rows [table_stride] of factors and addends by output channel, null: 1 and 0. A sample n of x uses row table_row[n].
  Global<const float> scale, shift;
  int64_t table_stride;
  Global<const int32_t> table_row;  // null: row 0
  // Added before the factor, by output channel of the whole layer: output n of group g has entry g * group_rows + n.
  Global<const float> bias;  // null: 0
  Act act;
  // Null: 1. Else sample n of y becomes gate[n] * act(...) + (1 - gate[n]) * residual.
  Global<const float> gate;
  // The lists' entries from the count to this one copy their residual to y as it is, each sample of both `ys.n`
  // contiguous elements. 0: none.
  int32_t copied;
  bool wide_y, wide_residual;  // 16-byte access to every eight (four) channels from a multiple of that on
};

}  // namespace effkern::conv::gpu
