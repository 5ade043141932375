#include "slice.h"

namespace effkern::sliced_conv {

RunningPart running_part(const PackedWeight::Dims& d, int64_t c_in, int64_t c_out, const std::string& group_mode,
                         const char* op) {
  EFFKERN_CHECK_VALUE(group_mode == "prefix_groups" || group_mode == "within_group", op,
                      ": group_mode must be prefix_groups or within_group, got '", group_mode, "'");
  EFFKERN_CHECK_VALUE(c_in >= 0 && c_in <= d.in_per_group * d.groups, op, ": x must have at most ",
                      d.in_per_group * d.groups, " channels (the weight's), got ", c_in);
  EFFKERN_CHECK_VALUE(c_out >= 0 && c_out <= d.out_channels, op, ": c_out must be in [0, ", d.out_channels, "], got ",
                      c_out);
  if (d.groups == 1) return {1, c_out, c_in};
  const int64_t out_per_group = d.out_channels / d.groups;
  if (group_mode == "within_group") {
    EFFKERN_CHECK_VALUE(c_in % d.groups == 0 && c_out % d.groups == 0, op, ": groups = ", d.groups,
                        " must divide x's channels and c_out, got ", c_in, " and ", c_out);
    return {d.groups, c_out / d.groups, c_in / d.groups};
  }
  EFFKERN_CHECK_VALUE(d.in_per_group > 0 && c_in % d.in_per_group == 0, op, ": x's channels must be a multiple of the ",
                      d.in_per_group, " channels of a group, got ", c_in);
  const int64_t running = c_in / d.in_per_group;
  EFFKERN_CHECK_VALUE(c_out == running * out_per_group, op, ": c_out must be ", running * out_per_group, " for the ",
                      running, " groups that x's ", c_in, " channels run, got ", c_out);
  return {running, out_per_group, d.in_per_group};
}

MaybeTensor first(const MaybeTensor& vector, int64_t size, Arg arg) {
  if (!vector.has_value()) return vector;
  check_cpu(*vector, arg);
  EFFKERN_CHECK_VALUE(vector->dim() == 1 && vector->size(0) >= size, arg.op, ": ", arg.name,
                      " must be 1-d with at least c_out = ", size, " elements, got shape ", shape_text(*vector));
  if (vector->size(0) == size) return vector;
  Tensor whole = *vector;
  return torch::stable::narrow(whole, 0, 0, size);
}

const float* combined_shift(const float* bias, const float* scale, const float* shift, int64_t size,
                            std::vector<float>& storage) {
  if (bias == nullptr) return shift;
  if (scale == nullptr && shift == nullptr) return bias;
  storage.resize(static_cast<size_t>(size) + 1);
  for (int64_t i = 0; i < size; ++i)
    storage[i] = bias[i] * (scale != nullptr ? scale[i] : 1.0f) + (shift != nullptr ? shift[i] : 0.0f);
  return storage.data();
}

}  // namespace effkern::sliced_conv
