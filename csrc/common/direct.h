// Calls of ops past the dispatcher: what _host.so, another library, hands to _C.so (csrc/host/direct.cpp). No torch
// here.
//
// An entry returns 0 if it did the call, and 1 if the arguments are not what the op takes; nothing was made or written
// then, and the call through the dispatcher says what is wrong with them.
#pragma once

#include <cstdint>

namespace effkern::direct {

// A CPU tensor. `capacity`: elements its storage holds from `data` on; `type`: the number of torch's ScalarType.
struct TensorRef {
  const void* data;
  const int64_t *sizes, *strides;
  int64_t dim, capacity;
  int32_t type;
};

// Makes the output, once, when everything is checked: returns its memory, or null to give up.
struct Output {
  void* (*make)(void* context, const int64_t size[4], const int64_t stride[4], int32_t type);
  void* context;
};

struct RepConv {
  TensorRef x, handle, residual;  // residual.data is null if there is none
  int64_t out_channels, kernel[2], stride[2], padding[2], dilation[2], groups;
  const char *act, *algo;
};
using RepConvEntry = int (*)(const RepConv*, const Output*);  // effkern_rep_conv2d_packed

struct SlicedConv {
  TensorRef x, handle, scale, shift;  // scale.data and shift.data are null where there is none
  int64_t c_in;                       // of x's channels; below 0: all
  int64_t out_channels, kernel[2], c_out, stride[2], padding[2], dilation[2], groups;
  const char *group_mode, *act, *algo;
};
using SlicedConvEntry = int (*)(const SlicedConv*, const Output*);  // effkern_sliced_conv2d_packed

// The blocks of a stage, prepared once for many calls. Their tensors must live as long, and keep their memory.
struct SkipStage {
  const TensorRef *weights, *biases;
  int64_t tensors, blocks, channels;  // tensors: of weights, and of biases
  int32_t type;                       // of x
  const char *kind, *act, *algo;
};
using SkipStagePrepare = void* (*)(const SkipStage*);  // effkern_skip_stage_prepare: null if they do not fit
using SkipStageRelease = void (*)(void* stage);        // effkern_skip_stage_release
using SkipStageEntry = int (*)(const void* stage, const TensorRef* x, const TensorRef* keep,
                               const Output*);  // effkern_skip_stage

// One block: basic with two weights and biases, bottleneck with three.
struct SkipBlock {
  TensorRef x, keep, residual;  // residual.data is null if there is none
  TensorRef weights[3], biases[3];
  int64_t tensors, stride;
  const char *act, *algo;
};
using SkipBlockEntry = int (*)(const SkipBlock*, const Output*);  // effkern_skip_block

}  // namespace effkern::direct
