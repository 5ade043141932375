// What the gradient through a ragged epilogue (ragged_grad.cuh) is given.
#pragma once

#include "../common/cuda/columns.h"
#include "../common/cuda/indices.h"
#include "../common/cuda/stream.h"
#include "../conv/conv_gpu.h"

namespace effkern::sliced_conv {

using device::Global;

// Sample n has y = act(z * scale + shift) in channels [0, c_out[n]), with a row of the tables for each sample:
// gz = scale * act'(z * scale + shift) * gy there, and nothing elsewhere. Maps are rows of channels.
template <class T>
struct RaggedGrad : device::Pieces {
  device::Rows<const T> gy, y, z;  // y: read for relu and relu6; z: for the other activations and `by_scale`
  device::Rows<T> gz;              // .at null: not wanted
  device::Indices c_out;
  Global<const float> scale, shift;  // [rows][table_stride], null: 1 and 0
  Global<const int32_t> table_row;   // [samples], with tables
  int64_t table_stride;
  // Sums over a piece, [samples * pieces][channels], zeros past a sample's channels; null: not wanted.
  Global<float> by_shift, by_scale, by_bias;
  conv::gpu::Act act;
  bool wide;  // 16-byte access to all maps
};

// Bytes that the kernel's instructions ask for where samples have `active` channels in all.
struct RaggedGradWork {
  int64_t bytes_read = 0, bytes_written = 0;
};
template <class T>
RaggedGradWork ragged_grad_work(const RaggedGrad<T>& p, int64_t active) {
  const bool clips = p.act == conv::gpu::Act::Relu || p.act == conv::gpu::Act::Relu6;
  const bool z = p.by_scale || (!clips && p.act != conv::gpu::Act::None);
  const int64_t size = sizeof(T), threads = p.template blocks<T>() * device::kColumnThreads;
  RaggedGradWork work;
  work.bytes_read = active * p.pixels * size * (1 + (clips ? 1 : 0) + (z ? 1 : 0)) + threads * (p.c_out.wide ? 8 : 4);
  if (p.gz.at) work.bytes_written += active * p.pixels * size;
  for (const bool sums : {static_cast<bool>(p.by_shift), static_cast<bool>(p.by_scale), static_cast<bool>(p.by_bias)})
    if (sums) work.bytes_written += int64_t{p.samples} * p.pieces * p.channels * 4;
  return work;
}

// Sums of the samples that share a row of a table, in order: to[row][column], zeros past `channels`.
struct FoldTable {
  Global<const float> sums;  // [samples * pieces][channels]
  Global<const int32_t> table_row;
  Global<float> to;  // [rows][columns]
  int32_t samples, pieces, channels, rows, columns;
};

// Where every sample has a row of the table: each element looks at the row of every sample.
inline RaggedGradWork fold_table_work(const FoldTable& p) {
  return {int64_t{p.samples} * p.channels * (int64_t{p.rows} + p.pieces) * 4, int64_t{p.rows} * p.columns * 4};
}

// One launch each.
template <class T>
void run(const RaggedGrad<T>& p, device::Stream stream);
void run(const FoldTable& p, device::Stream stream);

}  // namespace effkern::sliced_conv
