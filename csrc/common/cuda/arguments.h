// Tensors on the GPU as kernels take them: checked, with channels side by side, small vectors as fp32. What is in them
// is never looked at, since that would wait for the device: values that the CPU refuses (widths, masks, factors that
// are not finite) are taken as the op's documentation says.
#pragma once

#include <optional>

#include "../packed_weight.h"
#include "scope.h"

namespace effkern::device {

// Calls f with a zero of the type kernels hold it in: 16 bits or float.
template <class F>
void in_type(ScalarType type, const F& f) {
  if (type == ScalarType::Half)
    f(F16{});
  else if (type == ScalarType::BFloat16)
    f(BF16{});
  else
    f(float{});
}

// TypeError unless the tensor is on the GPU, ValueError unless it is x's and has memory.
void check_here(const Tensor& tensor, const Tensor& x, Arg arg);

// A 4-d float tensor on the GPU; its channels side by side, copied only where they are not.
Tensor pixels(const Tensor& map, const Tensor& x, Arg arg);

// A weight [co, ci, kh, kw] with input channels side by side and taps in a row, copied only where they are not: a
// channels_last weight is read in place.
Tensor taps(const Tensor& weight);

// A vector of at least, or exactly, `size` elements of fp32 or `other`, as contiguous fp32.
MaybeTensor vector(const MaybeTensor& tensor, int64_t size, bool exact, ScalarType other, const Tensor& x, Arg arg);

// A table [rows, >= columns] likewise, as contiguous fp32 rows.
MaybeTensor table(const MaybeTensor& tensor, int64_t columns, ScalarType other, const Tensor& x, Arg arg);

Tensor empty(const Layout& layout, ScalarType type, const Tensor& like);
Tensor empty_ints(int64_t size, const Tensor& like);

// What an op returns, and what its kernel writes: the same where x is channels_last, else copied at the end.
class Output {
 public:
  // Of `type`, x's if none is given.
  Output(const Tensor& x, int64_t c, int64_t h, int64_t w, std::optional<ScalarType> type = std::nullopt);
  Tensor& pixels() { return work_; }
  Tensor finish();

 private:
  Tensor result_, work_;
  bool same_;
};

}  // namespace effkern::device
