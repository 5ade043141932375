// What "the first c_in x c_out channels" means for each kind of weight, and the epilogue of a sliced layer.
#pragma once

#include <string>
#include <vector>

#include "../common/packed_weight.h"

namespace effkern::sliced_conv {

// The running groups and channels for a prefix. Without groups a plain prefix. "prefix_groups": channels per group are
// fixed and the first c_in / in_per_group groups run (depthwise, slimmable ResNeXt). "within_group": all groups run
// with a prefix inside each. ValueError if the widths do not fit.
RunningPart running_part(const PackedWeight::Dims& dims, int64_t c_in, int64_t c_out, const std::string& group_mode,
                         const char* op);

// The first `size` elements of a vector that may be longer (per-channel parameters of the whole layer).
MaybeTensor first(const MaybeTensor& vector, int64_t size, Arg arg);

// (acc + bias) * scale + shift = acc * scale + (bias * scale + shift): the addend, in `storage` where two combine.
const float* combined_shift(const float* bias, const float* scale, const float* shift, int64_t size,
                            std::vector<float>& storage);

}  // namespace effkern::sliced_conv
