// A convolution on the GPU asked in tensors: what the ops of several families share between their checks and the
// launch.
#pragma once

#include "../common/cuda/arguments.h"
#include "../common/cuda/indices.h"
#include "conv_gpu.h"

namespace effkern::conv::gpu {

// All tensors lie on one device. x, y and residual have channels side by side (device::pixels), the weight is as
// device::taps gives it; lists are int32, vectors fp32, both contiguous.
struct Question {
  const char* op;
  Tensor x, weight, y;
  PackedWeight::Dims dims;
  RunningPart part;  // with `parts`: the widest there can be
  Geometry geometry;
  conv::Act act = conv::Act::None;
  MaybeTensor residual = {}, bias = {}, scale = {}, shift = {}, table_row = {};
  int64_t table_stride = 0;
  int64_t samples = 0;  // listed ones; with `count`: the most there can be
  MaybeTensor x_rows = {}, y_rows = {}, residual_rows = {}, count = {}, parts = {}, part_count = {}, gate = {};
  int64_t zero_to = 0, copied = 0;  // see Problem
  // Depthwise only: widths by sample, and the rows of the tables. int32 or int64 tensors that `indices` checked.
  MaybeTensor c_in = {}, c_out = {}, table = {};
  int64_t most_row = 0;
};

// A [samples] list of int32 or int64 on x's device.
device::Indices indices(const device::Scope& scope, const Tensor& list, const Tensor& x, Arg arg);

// Whether the running part is one filter a channel.
inline bool is_depthwise(const RunningPart& part) {
  return part.groups > 1 && part.in_per_group == 1 && part.out_per_group == 1;
}

// Launches the kernel on the scope's stream. ValueError where it cannot run the question (see conv_cuda.h).
void run(const device::Scope& scope, const Question& question);

// Whether fp32 is multiplied in tf32 on tensor cores (EFFKERN_TF32=1); off unless asked for, as it keeps 10 bits.
bool tf32();

}  // namespace effkern::conv::gpu
