// rep_conv2d on CUDA: one launch for channels_last tensors and weights; other layouts are copied first.
#include <string>
#include <vector>

#include "../conv/conv_op.h"

namespace effkern::rep_conv {
namespace {

Tensor rep_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, Text act,
                  const MaybeTensor& residual, Text algo) {
  constexpr const char* op = "rep_conv2d";
  const device::Scope scope(x, {op, "x"});
  const Tensor in = device::pixels(x, x, {op, "x"});
  const ScalarType dtype = x.scalar_type();
  device::check_here(weight, x, {op, "weight"});
  const PackedWeight::Dims dims = weight_dims(weight, groups, {op, "weight"}, &dtype);
  EFFKERN_CHECK_VALUE(x.size(1) == dims.in_per_group * dims.groups, op, ": x must have ",
                      dims.in_per_group * dims.groups, " channels (the weight's ", dims.in_per_group,
                      " x groups = ", dims.groups, "), got ", x.size(1));
  const Geometry g = geometry(stride, padding, dilation, op);
  const conv::Act activate = act_from_name(act, op);
  check_algo(algo, op);
  int64_t map[2];
  output_map(x, dims.kh, dims.kw, g, op, map);
  const MaybeTensor offset = device::vector(bias, dims.out_channels, /*exact=*/true, dtype, x, {op, "bias"});
  MaybeTensor addend;
  if (residual.has_value()) {
    addend = device::pixels(*residual, x, {op, "residual"});
    EFFKERN_CHECK_TYPE(residual->scalar_type() == dtype, op, ": residual must have x's dtype");
    EFFKERN_CHECK_VALUE(residual->size(0) == x.size(0) && residual->size(1) == dims.out_channels &&
                            residual->size(2) == map[0] && residual->size(3) == map[1],
                        op, ": residual must have the output's shape [", x.size(0), ", ", dims.out_channels, ", ",
                        map[0], ", ", map[1], "], got ", shape_text(*residual));
  }
  device::Output y(x, dims.out_channels, map[0], map[1]);
  if (y.pixels().numel() == 0) return y.finish();
  conv::gpu::run(scope, {.op = op,
                         .x = in,
                         .weight = device::taps(weight),
                         .y = y.pixels(),
                         .dims = dims,
                         .part = {dims.groups, dims.out_channels / dims.groups, dims.in_per_group},
                         .geometry = g,
                         .act = activate,
                         .residual = addend,
                         .bias = offset,
                         .samples = x.size(0)});
  return y.finish();
}

}  // namespace
}  // namespace effkern::rep_conv

EFFKERN_CUDA_OPS(m) { m.impl("rep_conv2d", TORCH_BOX(&effkern::rep_conv::rep_conv2d)); }
