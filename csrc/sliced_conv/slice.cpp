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

int64_t bias_size(const PackedWeight::Dims& dims, const RunningPart& run) {
  const int64_t running = run.groups * run.out_per_group;
  return run.groups == 1 || run.out_per_group == dims.out_channels / dims.groups ? running : dims.out_channels;
}

Tensor as_map(const Tensor& matrix, Arg arg) {
  EFFKERN_CHECK_VALUE(matrix.dim() == 2, arg.op, ": ", arg.name, " must be 2-d, got shape ", shape_text(matrix));
  return torch::stable::unsqueeze(torch::stable::unsqueeze(matrix, 2), 3);
}

}  // namespace effkern::sliced_conv
