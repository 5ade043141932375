// Of what a slice is, the part that reads the CPU's memory or its handles.
#include "slice.h"

namespace effkern::sliced_conv {

void check_handle(const View& handle, int64_t out_channels, const std::vector<int64_t>& kernel_size, int64_t groups,
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

FloatVector first(const MaybeView& vector, int64_t size, ScalarType other, Arg arg, bool finite) {
  if (!vector.has_value()) return {};
  check_cpu(*vector, arg);
  EFFKERN_CHECK_VALUE(vector->dim() == 1 && vector->size(0) >= size, arg.op, ": ", arg.name,
                      " must be 1-d with at least ", size, " elements, got shape ", shape_text(*vector));
  return {vector->leading(&size), size, other, arg, finite};
}

void add_bias(const float* bias, const float* scale, const float* shift, const PackedWeight::Dims& dims,
              const RunningPart& run, float* out) {
  const int64_t group_size = dims.out_channels / dims.groups;
  for (int64_t g = 0, c = 0; g < run.groups; ++g)
    for (int64_t o = 0; o < run.out_per_group; ++o, ++c)
      out[c] = bias[g * group_size + o] * (scale != nullptr ? scale[c] : 1.0f) + (shift != nullptr ? shift[c] : 0.0f);
}

}  // namespace effkern::sliced_conv
