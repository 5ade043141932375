// What "the first c_in x c_out channels" means for each kind of weight, and the epilogue of a sliced layer.
#pragma once

#include <string>
#include <vector>

#include "../common/packed_weight.h"

namespace effkern::sliced_conv {

// What messages call the two widths.
struct WidthNames {
  const char* op;
  std::string c_in, c_out;
};

// ValueError unless the name is one of the two that running_part() knows.
void check_group_mode(const std::string& group_mode, const char* op);

// The running groups and channels for a prefix. Without groups a plain prefix. "prefix_groups": channels per group are
// fixed and the first c_in / in_per_group groups run (depthwise, slimmable ResNeXt). "within_group": all groups run
// with a prefix inside each. ValueError if the widths do not fit.
RunningPart running_part(const PackedWeight::Dims& dims, int64_t c_in, int64_t c_out, const std::string& group_mode,
                         const WidthNames& names);

// That a handle was packed from a weight of these dimensions.
void check_handle(const View& handle, int64_t out_channels, const std::vector<int64_t>& kernel_size, int64_t groups,
                  const char* op);

// The first `size` elements of a vector that may be longer (per-channel parameters of the whole layer).
FloatVector first(const MaybeView& vector, int64_t size, ScalarType other, Arg arg, bool finite = false);

// Elements a bias must have: those of the outputs that run, all of them where they are not the leading ones.
int64_t bias_size(const PackedWeight::Dims& dims, const RunningPart& run);

// (acc + bias) * scale + shift = acc * scale + (bias * scale + shift): writes the addend of every running output. The
// bias is that of the whole layer; scale and shift belong to the running outputs and may be null.
void add_bias(const float* bias, const float* scale, const float* shift, const PackedWeight::Dims& dims,
              const RunningPart& run, float* out);

// A 2-d tensor as maps of one pixel, [n, c, 1, 1]: a linear layer is a 1x1 convolution.
Tensor as_map(const Tensor& matrix, Arg arg);

}  // namespace effkern::sliced_conv
