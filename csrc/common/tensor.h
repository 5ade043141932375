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
#include <span>
#include <string>
#include <vector>

#include "../conv/problem.h"
#include "check.h"
#include "half.h"

namespace effkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A string argument of an operator. Not std::string: the header of torch 2.10 to 2.13 converts to that through a `new`
// that nobody deletes. 48 bytes a call are little, but they lie between the activations and keep the allocator from
// joining what is freed there: a training of an hour grew by gigabytes.
struct Text : std::string {};

// Every size and stride is kept below this, so that products of two fit an int64 with room.
constexpr int64_t kLimit = int64_t{1} << 31;
constexpr int64_t kMaxElements = int64_t{1} << 58;

// A tensor as kernels look at it, without a reference: valid while the tensor lives.
class View {
 public:
  View(const Tensor& tensor);
  // `capacity`: elements that the storage holds from `data` on.
  View(const void* data, ScalarType type, torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides,
       bool is_cpu, int64_t capacity)
      : data_(data),
        sizes_(sizes.data()),
        strides_(strides),
        dim_(static_cast<int64_t>(sizes.size())),
        capacity_(capacity),
        type_(type),
        is_cpu_(is_cpu) {}

  // The leading elements in every dimension; `sizes` must live as long as the view, and not be above its own.
  View leading(const int64_t* sizes) const {
    return {data_, type_, {sizes, static_cast<size_t>(dim_)}, strides_, is_cpu_, capacity_};
  }

  // Whether the elements lie within the storage, which anyone may have resized since.
  bool has_memory() const;
  const void* const_data_ptr() const { return data_; }
  ScalarType scalar_type() const { return type_; }
  bool is_cpu() const { return is_cpu_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dim_; ++i) product *= sizes_[i];
    return product;
  }

 private:
  const void* data_;
  const int64_t *sizes_, *strides_;
  int64_t dim_, capacity_;
  ScalarType type_;
  bool is_cpu_;
};

using MaybeView = std::optional<View>;

// Where a check happens: the op and the argument, for messages.
struct Arg {
  const char* op;
  const char* name;
};

std::string shape_text(const View& tensor);

// float32, bfloat16 or float16; TypeError otherwise.
DType float_dtype(const View& tensor, Arg arg);

// TypeError unless the tensor is a CPU tensor, ValueError if its storage was resized to less (as sharding does).
void check_cpu(const View& tensor, Arg arg);

// A 4-d CPU float tensor of any strides.
conv::Activation activation(const View& tensor, Arg arg);

// [n, c, h, w] as it will lie in memory: channels_last if x is, in the sense of `channels_last`, else contiguous.
struct Layout {
  int64_t size[4], stride[4];
};
Layout layout_like(const View& x, int64_t n, int64_t c, int64_t h, int64_t w);

Tensor empty(const Layout& layout, ScalarType type);  // uninitialised

// Makes `y` in a layout, for ops that ask whoever calls them for the memory of their output.
inline auto into(std::optional<Tensor>& y) {
  return [&y](const Layout& layout, ScalarType type) { return y.emplace(empty(layout, type)).mutable_data_ptr(); };
}

// The same as the engine takes it, at `data`.
conv::Activation activation(const Layout& layout, void* data, ScalarType type);

// Uninitialised, of x's dtype and in its layout.
Tensor like_input(const View& x, int64_t n, int64_t c, int64_t h, int64_t w);

// The layout rule of the package (Python's twin: effkern/ops/_registry.py): decided by strides, and NCHW where both
// fit.
bool channels_last(const View& x);

// A 1-d tensor of `size` elements, float32 or `other` dtype, read as fp32. Views fp32 memory, converts anything else.
class FloatVector {
 public:
  FloatVector() = default;
  FloatVector(const MaybeView& tensor, int64_t size, ScalarType other, Arg arg, bool finite = false);
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
Geometry geometry(std::span<const int64_t> stride, std::span<const int64_t> padding, std::span<const int64_t> dilation,
                  const char* op);

void set_geometry(conv::Problem& problem, const Geometry& g);

// Output height and width of x under a kernel; ValueError if the kernel does not fit.
void output_map(const View& x, int64_t kh, int64_t kw, const Geometry& g, const char* op, int64_t out[2]);

}  // namespace effkern

template <>
struct torch::stable::detail::ToImpl<effkern::Text> {
  static effkern::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    effkern::Text text;
    text.assign(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
