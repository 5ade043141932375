#include "slice.h"

namespace effkern::sliced_conv {

void check_group_mode(const std::string& group_mode, const char* op) {
  EFFKERN_CHECK_VALUE(group_mode == "prefix_groups" || group_mode == "within_group", op,
                      ": group_mode must be prefix_groups or within_group, got '", group_mode, "'");
}

RunningPart running_part(const PackedWeight::Dims& d, int64_t c_in, int64_t c_out, const std::string& group_mode,
                         const WidthNames& names) {
  const char* op = names.op;
  check_group_mode(group_mode, op);
  EFFKERN_CHECK_VALUE(c_in >= 0 && c_in <= d.in_per_group * d.groups, op, ": ", names.c_in, " must be in [0, ",
                      d.in_per_group * d.groups, "], got ", c_in);
  EFFKERN_CHECK_VALUE(c_out >= 0 && c_out <= d.out_channels, op, ": ", names.c_out, " must be in [0, ", d.out_channels,
                      "], got ", c_out);
  if (d.groups == 1) return {1, c_out, c_in};
  const int64_t out_per_group = d.out_channels / d.groups;
  if (group_mode == "within_group") {
    EFFKERN_CHECK_VALUE(c_in % d.groups == 0 && c_out % d.groups == 0, op, ": ", names.c_in, " and ", names.c_out,
                        " must be multiples of groups = ", d.groups, ", got ", c_in, " and ", c_out);
    return {d.groups, c_out / d.groups, c_in / d.groups};
  }
  EFFKERN_CHECK_VALUE(d.in_per_group > 0 && c_in % d.in_per_group == 0, op, ": ", names.c_in,
                      " must be a multiple of the ", d.in_per_group, " channels of a group, got ", c_in);
  const int64_t running = c_in / d.in_per_group;
  EFFKERN_CHECK_VALUE(c_out == running * out_per_group, op, ": ", names.c_out, " must be ", running * out_per_group,
                      " where ", names.c_in, " are ", c_in, ", got ", c_out);
  return {running, out_per_group, d.in_per_group};
}

void check_handle(const Tensor& handle, int64_t out_channels, const std::vector<int64_t>& kernel_size, int64_t groups,
                  const char* op) {
  EFFKERN_CHECK_TYPE(PackedWeight::is_handle(handle), op,
                     ": handle must be a 1-d uint8 tensor made by pack_conv_weight, got shape ", shape_text(handle));
  const PackedWeight::Dims dims = PackedWeight::dims(handle, groups, {op, "handle"});
  EFFKERN_CHECK_VALUE(kernel_size.size() == 2, op, ": kernel_size must have 2 entries, got ", kernel_size.size());
  EFFKERN_CHECK_VALUE(dims.out_channels == out_channels && dims.kh == kernel_size[0] && dims.kw == kernel_size[1], op,
                      ": handle was packed for ", dims.out_channels, " output channels and a ", dims.kh, "x", dims.kw,
                      " kernel, got out_channels = ", out_channels, " and kernel_size = ", kernel_size[0], "x",
                      kernel_size[1]);
}

MaybeTensor first(const MaybeTensor& vector, int64_t size, Arg arg) {
  if (!vector.has_value()) return vector;
  check_cpu(*vector, arg);
  EFFKERN_CHECK_VALUE(vector->dim() == 1 && vector->size(0) >= size, arg.op, ": ", arg.name,
                      " must be 1-d with at least ", size, " elements, got shape ", shape_text(*vector));
  if (vector->size(0) == size) return vector;
  Tensor whole = *vector;
  return torch::stable::narrow(whole, 0, 0, size);
}

int64_t bias_size(const PackedWeight::Dims& dims, const RunningPart& run) {
  const int64_t running = run.groups * run.out_per_group;
  return run.groups == 1 || run.out_per_group == dims.out_channels / dims.groups ? running : dims.out_channels;
}

void add_bias(const float* bias, const float* scale, const float* shift, const PackedWeight::Dims& dims,
              const RunningPart& run, float* out) {
  const int64_t group_size = dims.out_channels / dims.groups;
  for (int64_t g = 0, c = 0; g < run.groups; ++g)
    for (int64_t o = 0; o < run.out_per_group; ++o, ++c)
      out[c] = bias[g * group_size + o] * (scale != nullptr ? scale[c] : 1.0f) + (shift != nullptr ? shift[c] : 0.0f);
}

Tensor as_map(const Tensor& matrix, Arg arg) {
  EFFKERN_CHECK_VALUE(matrix.dim() == 2, arg.op, ": ", arg.name, " must be 2-d, got shape ", shape_text(matrix));
  return torch::stable::unsqueeze(torch::stable::unsqueeze(matrix, 2), 3);
}

}  // namespace effkern::sliced_conv
