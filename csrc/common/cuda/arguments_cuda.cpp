#include "arguments.h"
#include "rows.h"

namespace effkern::device {

using torch::headeronly::MemoryFormat;

void check_here(const Tensor& tensor, const Tensor& x, Arg arg) {
  EFFKERN_CHECK_TYPE(is_here(tensor), arg.op, ": ", arg.name, " must be on the GPU like the other arguments");
  EFFKERN_CHECK_VALUE(tensor.get_device_index() == x.get_device_index(), arg.op, ": ", arg.name,
                      " must be on x's device ", x.get_device_index(), ", got ", tensor.get_device_index());
  EFFKERN_CHECK_VALUE(View(tensor).has_memory(), arg.op, ": ", arg.name, " must have memory, got shape ",
                      shape_text(tensor), " on a storage that was given back");
}

Tensor pixels(const Tensor& map, const Tensor& x, Arg arg) {
  check_here(map, x, arg);
  EFFKERN_CHECK_VALUE(map.dim() == 4, arg.op, ": ", arg.name, " must be 4-d [N, C, H, W], got shape ", shape_text(map));
  for (int i = 0; i < 4; ++i)
    EFFKERN_CHECK_VALUE(map.size(i) < kLimit, arg.op, ": ", arg.name, " must have dimensions below 2^31, got shape ",
                        shape_text(map));
  float_dtype(map, arg);
  if (map.size(1) <= 1 || map.stride(1) == 1 || map.numel() == 0) return map;
  return torch::stable::contiguous(map, MemoryFormat::ChannelsLast);
}

Tensor taps(const Tensor& w) {
  const bool channels = w.size(1) <= 1 || w.stride(1) == 1;
  const bool in_a_row = w.size(2) == 1 || w.size(3) == 1 || w.stride(2) == w.size(3) * w.stride(3);
  if ((channels && in_a_row) || w.numel() == 0) return w;
  return torch::stable::contiguous(w, MemoryFormat::ChannelsLast);
}

MaybeTensor vector(const MaybeTensor& tensor, int64_t size, bool exact, ScalarType other, const Tensor& x, Arg arg) {
  if (!tensor.has_value()) return tensor;
  check_here(*tensor, x, arg);
  EFFKERN_CHECK_VALUE(tensor->dim() == 1 && (exact ? tensor->size(0) == size : tensor->size(0) >= size), arg.op, ": ",
                      arg.name, " must be 1-d with ", exact ? "exactly " : "at least ", size, " elements, got shape ",
                      shape_text(*tensor));
  float_dtype(*tensor, arg);
  EFFKERN_CHECK_TYPE(tensor->scalar_type() == ScalarType::Float || tensor->scalar_type() == other, arg.op, ": ",
                     arg.name, " must be float32 or have x's dtype");
  return torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Float));
}

MaybeTensor table(const MaybeTensor& tensor, int64_t columns, ScalarType other, const Tensor& x, Arg arg) {
  if (!tensor.has_value()) return tensor;
  check_here(*tensor, x, arg);
  EFFKERN_CHECK_VALUE(tensor->dim() == 2 && tensor->size(1) >= columns, arg.op, ": ", arg.name,
                      " must be 2-d [W, C] with C at least c_out_max = ", columns, ", got shape ", shape_text(*tensor));
  float_dtype(*tensor, arg);
  EFFKERN_CHECK_TYPE(tensor->scalar_type() == ScalarType::Float || tensor->scalar_type() == other, arg.op, ": ",
                     arg.name, " must be float32 or have x's dtype");
  EFFKERN_CHECK_VALUE(tensor->size(0) < kLimit, arg.op, ": ", arg.name, " must have fewer than 2^31 rows, got ",
                      tensor->size(0));
  Tensor whole = *tensor;
  return torch::stable::contiguous(torch::stable::to(torch::stable::narrow(whole, 1, 0, columns), ScalarType::Float));
}

Tensor empty(const Layout& layout, ScalarType type, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, layout.size, layout.stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty_ints(int64_t size, const Tensor& like) {
  return torch::stable::empty({&size, 1}, ScalarType::Int, std::nullopt, like.device());
}

Output::Output(const Tensor& x, int64_t c, int64_t h, int64_t w, std::optional<ScalarType> type) {
  const int64_t n = x.size(0);
  const ScalarType dtype = type.value_or(x.scalar_type());
  result_ = empty(layout_like(x, n, c, h, w), dtype, x);
  same_ = c <= 1 || result_.stride(1) == 1 || result_.numel() == 0;
  work_ = same_ ? result_ : empty({{n, c, h, w}, {h * w * c, 1, w * c, c}}, dtype, x);
}

Tensor Output::finish() {
  if (!same_) torch::stable::copy_(result_, work_);
  return result_;
}

int64_t pitch_of(const Tensor& t) {
  return t.size(3) > 1 ? t.stride(3) : t.size(2) > 1 ? t.stride(2) : t.size(0) > 1 ? t.stride(0) : t.size(1);
}

Tensor as_rows(const Tensor& map, const Tensor& x, Arg arg) {
  const Tensor here = pixels(map, x, arg);
  const int64_t n = here.size(0), h = here.size(2), w = here.size(3), pitch = pitch_of(here);
  const bool in_rows = (h <= 1 || here.stride(2) == w * pitch) && (n <= 1 || here.stride(0) == h * w * pitch);
  if (here.numel() == 0 || in_rows) return here;
  Output copy(here, here.size(1), h, w);  // contiguous() would take a map that was cut out of a larger one as it is
  torch::stable::copy_(copy.pixels(), here);
  return copy.pixels();
}

}  // namespace effkern::device
