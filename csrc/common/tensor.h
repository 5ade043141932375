// From torch tensors to what the engine takes: checked views, output allocation, small vectors read as fp32.
#pragma once

// torch's headers are not clean under -Wextra.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../conv/problem.h"
#include "check.h"
#include "half.h"

namespace effkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Where a check happens: the op and the argument, for messages.
struct Arg {
  const char* op;
  const char* name;
};

std::string shape_text(const Tensor& tensor);

// float32, bfloat16 or float16; TypeError otherwise.
DType float_dtype(const Tensor& tensor, Arg arg);

// TypeError unless the tensor is a CPU tensor, ValueError if its storage was resized to less (as sharding does).
void check_cpu(const Tensor& tensor, Arg arg);

// A 4-d CPU float tensor of any strides.
conv::Activation activation(const Tensor& tensor, Arg arg);

// Uninitialised [n, c, h, w] of x's dtype: channels_last if x is, in the sense of `channels_last`, else contiguous.
Tensor like_input(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w);

// The layout rule of the package (Python's twin: effkern/ops/_registry.py): decided by strides, and NCHW where both
// fit.
bool channels_last(const Tensor& x);

// A 1-d tensor of `size` elements, float32 or `other` dtype, read as fp32. Views fp32 memory, converts anything else.
class FloatVector {
 public:
  FloatVector() = default;
  FloatVector(const MaybeTensor& tensor, int64_t size, ScalarType other, Arg arg, bool finite = false);
  FloatVector(FloatVector&&) = default;  // a moved vector keeps its memory, so data_ stays right
  FloatVector& operator=(FloatVector&&) = default;
  FloatVector(const FloatVector&) = delete;
  FloatVector& operator=(const FloatVector&) = delete;
  const float* data() const { return data_; }  // null if the tensor was not given
  explicit operator bool() const { return data_ != nullptr; }

 private:
  std::vector<float> own_;
  const float* data_ = nullptr;
};

conv::Act act_from_name(const std::string& name, const char* op);
conv::Algo algo_from_name(const std::string& name, const char* op);
void check_algo(const std::string& algo, const char* op);

// stride, padding, dilation of a 2-d convolution, checked.
struct Geometry {
  int64_t stride[2], pad[2], dil[2];
};
Geometry geometry(const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, const char* op);

void set_geometry(conv::Problem& problem, const Geometry& g);

// Output height and width of x under a kernel; ValueError if the kernel does not fit.
void output_map(const Tensor& x, int64_t kh, int64_t kw, const Geometry& g, const char* op, int64_t out[2]);

}  // namespace effkern
