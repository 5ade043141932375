#include "tensor.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"

namespace effkern {
namespace {

// Every size and stride is kept below this, so that products of two fit an int64 with room.
constexpr int64_t kLimit = int64_t{1} << 31;
constexpr int64_t kMaxElements = int64_t{1} << 58;

void torch_loop(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(begin, end, grain, body);
}
int64_t torch_threads() { return torch::stable::get_num_threads(); }

const bool plugged_in = (set_parallel(torch_loop, torch_threads), true);

void check_pair(std::span<const int64_t> pair, int64_t least, const char* name, const char* op) {
  EFFKERN_CHECK_VALUE(pair.size() == 2, op, ": ", name, " must have 2 values, got ", pair.size());
  for (const int64_t v : pair)
    EFFKERN_CHECK_VALUE(v >= least && v < kLimit, op, ": ", name, " must be at least ", least, ", got (", pair[0], ", ",
                        pair[1], ")");
}

}  // namespace

std::string shape_text(const View& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i != 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

View::View(const Tensor& tensor)
    : View(tensor.const_data_ptr(), tensor.scalar_type(), tensor.sizes(), tensor.strides().data(), tensor.is_cpu(), 0) {
  int64_t bytes = 0, offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  capacity_ = bytes / static_cast<int64_t>(tensor.element_size()) - offset;
}

bool View::has_memory() const {
  if (numel() == 0) return true;
  int64_t end = 0;
  for (int64_t i = 0; i < dim_; ++i) {
    int64_t last = 0;
    if (__builtin_mul_overflow(sizes_[i] - 1, strides_[i], &last) || __builtin_add_overflow(end, last, &end))
      return false;
  }
  return end < capacity_ && data_ != nullptr;
}

void check_cpu(const View& tensor, Arg arg) {
  EFFKERN_CHECK_TYPE(tensor.is_cpu(), arg.op, ": ", arg.name, " must be on the CPU like the other arguments");
  EFFKERN_CHECK_VALUE(tensor.has_memory(), arg.op, ": ", arg.name, " must have memory, got shape ", shape_text(tensor),
                      " on a storage that was given back");
}

DType float_dtype(const View& tensor, Arg arg) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::F32;
    case ScalarType::BFloat16:
      return DType::BF16;
    case ScalarType::Half:
      return DType::F16;
    default:
      fail("TypeError", arg.op, ": ", arg.name, " must be float32, bfloat16 or float16");
  }
}

conv::Activation activation(const Layout& y, void* data, ScalarType type) {
  return activation(View(data, type, {y.size, 4}, y.stride, true, std::numeric_limits<int64_t>::max()),
                    {"output", "y"});
}

conv::Activation activation(const View& tensor, Arg arg) {
  check_cpu(tensor, arg);
  EFFKERN_CHECK_VALUE(tensor.dim() == 4, arg.op, ": ", arg.name, " must be 4-d [N, C, H, W], got shape ",
                      shape_text(tensor));
  // With strides of 0 a tensor may have more elements than memory has bytes; the engine counts bytes of copies.
  const bool countable = tensor.numel() < kMaxElements;
  for (int i = 0; i < 4; ++i)
    EFFKERN_CHECK_VALUE(tensor.size(i) < kLimit && countable, arg.op, ": ", arg.name,
                        " must have dimensions below 2^31 and fewer than 2^58 elements, got shape ",
                        shape_text(tensor));
  conv::Activation a;
  a.dtype = float_dtype(tensor, arg);
  a.data = const_cast<void*>(tensor.const_data_ptr());
  a.n = tensor.size(0), a.c = tensor.size(1), a.h = tensor.size(2), a.w = tensor.size(3);
  a.sn = tensor.stride(0), a.sc = tensor.stride(1), a.sh = tensor.stride(2), a.sw = tensor.stride(3);
  // One channel has any channel stride: take the fast one.
  if (a.c == 1) a.sc = 1;
  return a;
}

bool channels_last(const View& x) { return x.size(1) > 1 && x.size(2) * x.size(3) > 1 && x.stride(1) == 1; }

Layout layout_like(const View& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  if (channels_last(x)) return {{n, c, h, w}, {h * w * c, 1, w * c, c}};
  const auto step = [](int64_t size) { return std::max<int64_t>(size, 1); };
  return {{n, c, h, w}, {step(c) * step(h) * step(w), step(h) * step(w), step(w), 1}};
}

Tensor empty(const Layout& layout, ScalarType type) {
  AtenTensorHandle handle = nullptr;  // torch::stable::empty looks its operator up by name at every call
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, layout.size, layout.stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor like_input(const View& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  return empty(layout_like(x, n, c, h, w), x.scalar_type());
}

FloatVector::FloatVector(const MaybeView& tensor, int64_t size, ScalarType other, Arg arg, bool finite) {
  if (!tensor.has_value()) return;
  check_cpu(*tensor, arg);
  EFFKERN_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == size, arg.op, ": ", arg.name, " must have shape [", size,
                      "], got ", shape_text(*tensor));
  const DType dtype = float_dtype(*tensor, arg);
  EFFKERN_CHECK_TYPE(dtype == DType::F32 || tensor->scalar_type() == other, arg.op, ": ", arg.name,
                     " must be float32 or have x's dtype");
  if (dtype == DType::F32 && (size <= 1 || tensor->stride(0) == 1)) {
    static const float nothing = 0;
    data_ = size > 0 ? static_cast<const float*>(tensor->const_data_ptr()) : &nothing;
  } else {
    own_.resize(static_cast<size_t>(size) + 1);
    for (int64_t i = 0; i < size; ++i) own_[i] = load_float(tensor->const_data_ptr(), dtype, i * tensor->stride(0));
    data_ = own_.data();
  }
  if (finite)
    for (int64_t i = 0; i < size; ++i)
      EFFKERN_CHECK_VALUE(std::isfinite(data_[i]), arg.op, ": ", arg.name, " must be finite, got ", data_[i],
                          " at index ", i);
}

conv::Act act_from_name(const std::string& name, const char* op) {
  using conv::Act;
  if (name == "none") return Act::None;
  if (name == "relu") return Act::Relu;
  if (name == "relu6") return Act::Relu6;
  if (name == "hardswish") return Act::Hardswish;
  if (name == "silu") return Act::Silu;
  fail("ValueError", op, ": act must be none, relu, relu6, hardswish or silu, got '", name, "'");
}

conv::Algo algo_from_name(const std::string& name, const char* op) {
  if (name == "auto") return conv::Algo::Auto;
  if (name == "direct") return conv::Algo::Direct;
  fail("ValueError", op, ": algo must be auto or direct, got '", name, "'");
}

void check_algo(const std::string& algo, const char* op) { algo_from_name(algo, op); }

Geometry geometry(std::span<const int64_t> stride, std::span<const int64_t> padding, std::span<const int64_t> dilation,
                  const char* op) {
  check_pair(stride, 1, "stride", op);
  check_pair(padding, 0, "padding", op);
  check_pair(dilation, 1, "dilation", op);
  return {{stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

void set_geometry(conv::Problem& problem, const Geometry& g) {
  for (int i = 0; i < 2; ++i) {
    problem.stride[i] = g.stride[i];
    problem.pad[i] = g.pad[i];
    problem.dil[i] = g.dil[i];
  }
}

void output_map(const View& x, int64_t kh, int64_t kw, const Geometry& g, const char* op, int64_t out[2]) {
  const int64_t kernel[2] = {kh, kw};
  for (int i = 0; i < 2; ++i) {
    EFFKERN_CHECK_VALUE(kernel[i] >= 1 && kernel[i] < kLimit / 2, op, ": kernel size must be at least 1, got ",
                        kernel[i]);
    out[i] = conv::out_size(x.size(2 + i), kernel[i], g.stride[i], g.pad[i], g.dil[i]);
    EFFKERN_CHECK_VALUE(out[i] > 0, op, ": x of size ", x.size(2 + i), " with padding ", g.pad[i],
                        " is smaller than the kernel of size ", kernel[i], " with dilation ", g.dil[i],
                        " in dimension ", 2 + i);
  }
}

}  // namespace effkern
