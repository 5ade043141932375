#include "tensor.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"

namespace effkern {
namespace {

void torch_loop(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(begin, end, grain, body);
}
int64_t torch_threads() { return torch::stable::get_num_threads(); }

const bool plugged_in = (set_parallel(torch_loop, torch_threads), true);

}  // namespace

void check_cpu(const View& tensor, Arg arg) {
  EFFKERN_CHECK_TYPE(tensor.is_cpu(), arg.op, ": ", arg.name, " must be on the CPU like the other arguments");
  EFFKERN_CHECK_VALUE(tensor.has_memory(), arg.op, ": ", arg.name, " must have memory, got shape ", shape_text(tensor),
                      " on a storage that was given back");
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

}  // namespace effkern
