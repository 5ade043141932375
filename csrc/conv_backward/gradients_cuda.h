// Gradients of a convolution on the GPU asked in tensors: what the backward ops of several families share between their
// checks and the launches.
#pragma once

#include "../conv/conv_op.h"

namespace effkern::conv::gpu {

// The samples that take part, by lists in device memory, so that nothing waits for the host.
struct Listed {
  MaybeTensor rows = {};   // int32: entry i is sample rows[i] of both maps; none: all in order
  MaybeTensor count = {};  // int32: entries; none: as many as there are samples
  // Widths by class of entries, widest first, as sliced_conv's schedule() makes them; none: one width.
  MaybeTensor parts = {}, part_count = {};
};

// A convolution whose gradients are asked for. All tensors lie on one device; gz, x and weight have one type, gz and x
// channels side by side. gz is not read past a sample's outputs, x not past its inputs.
struct Convolution {
  const char* op;
  Tensor gz, x, weight;
  PackedWeight::Dims dims;
  RunningPart part;  // with parts: the widest there can be
  Geometry geometry;
  // Widths by sample, int32 or int64 [N]: with parts, and for depthwise convolutions whose widths differ.
  MaybeTensor c_in = {}, c_out = {};
};

// gx: channels side by side. Samples that are not listed, and channels past x's part, are left as they are; with
// c_in, channels past a sample's inputs become zeros. listed.parts: of (outputs, inputs), not of (inputs, outputs).
// `addend`, for stride 1 alone, is added, and copied as it is for `copied` samples that listed.rows has behind
// listed.count; both are dense then.
void input_gradient(const device::Scope& scope, const Convolution& c, Tensor& gx, const Listed& listed = {},
                    const MaybeTensor& addend = {}, int64_t copied = 0);

// gw: the whole weight's, zeros where nothing ran, x's type or fp32. Depthwise convolutions take no lists.
void weight_gradient(const device::Scope& scope, const Convolution& c, Tensor& gw, const Listed& listed = {});

}  // namespace effkern::conv::gpu
