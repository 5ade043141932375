// What CPU and GPU ops ask of their arguments alike: shapes, dtypes, names. Reads no element.
#include <algorithm>

#include "packed_weight.h"

namespace effkern {
namespace {

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

bool channels_last(const View& x) { return x.size(1) > 1 && x.size(2) * x.size(3) > 1 && x.stride(1) == 1; }

Layout layout_like(const View& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  if (channels_last(x)) return {{n, c, h, w}, {h * w * c, 1, w * c, c}};
  const auto step = [](int64_t size) { return std::max<int64_t>(size, 1); };
  return {{n, c, h, w}, {step(c) * step(h) * step(w), step(h) * step(w), step(w), 1}};
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

void check_groups(int64_t groups, const char* op) {
  EFFKERN_CHECK_VALUE(groups >= 1, op, ": groups must be at least 1, got ", groups);
}

bool PackedWeight::is_handle(const View& weight) {
  return weight.dim() == 1 && weight.scalar_type() == ScalarType::Byte;
}

PackedWeight::Dims weight_dims(const View& weight, int64_t groups, Arg arg, const ScalarType* dtype) {
  check_groups(groups, arg.op);
  EFFKERN_CHECK_VALUE(weight.dim() == 4, arg.op, ": ", arg.name, " must be 4-d [Co, Ci/groups, kh, kw], got shape ",
                      shape_text(weight));
  float_dtype(weight, arg);
  if (dtype != nullptr)
    EFFKERN_CHECK_TYPE(weight.scalar_type() == *dtype, arg.op, ": ", arg.name, " must have x's dtype");
  EFFKERN_CHECK_VALUE(weight.size(0) % groups == 0, arg.op, ": groups = ", groups,
                      " must divide the output channels of ", arg.name, ", got ", weight.size(0));
  EFFKERN_CHECK_VALUE(weight.size(2) >= 1 && weight.size(3) >= 1, arg.op, ": ", arg.name,
                      " must have a kernel of at least 1x1, got shape ", shape_text(weight));
  for (const int64_t v : {groups, weight.size(0), weight.size(1), weight.size(2), weight.size(3)})
    EFFKERN_CHECK_VALUE(v < kLimit, arg.op, ": groups and the dimensions of ", arg.name, " must be below 2^31, got ",
                        v);
  return {weight.size(0), weight.size(1), weight.size(2), weight.size(3), groups};
}

}  // namespace effkern
