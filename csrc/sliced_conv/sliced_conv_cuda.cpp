// Uniform sliced convolution and linear layer on CUDA: the weight's running part is read in place.
#include <string>
#include <vector>

#include "../conv/conv_op.h"
#include "calls.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

Tensor run(const UniformArguments& a) {
  const char* op = a.names.op;
  const Tensor& x = a.x;
  const device::Scope scope(x, {op, "x"});
  const Tensor in = device::pixels(x, x, {op, "x"});
  const ScalarType dtype = x.scalar_type();
  device::check_here(a.weight, x, {op, "weight"});
  const PackedWeight::Dims dims = weight_dims(a.weight, a.groups, {op, "weight"}, &dtype);
  const RunningPart part = running_part(dims, x.size(1), a.c_out, a.group_mode, a.names);
  const Geometry g = geometry(a.stride, a.padding, a.dilation, op);
  check_algo(a.algo, op);
  const conv::Act act = act_from_name(a.act, op);
  const int64_t bias_elements = bias_size(dims, part);
  const bool whole = a.groups > 1 && a.group_mode == "within_group";
  const MaybeTensor bias = device::vector(a.bias, bias_elements, whole, dtype, x, {op, "bias"});
  const MaybeTensor scale = device::vector(a.scale, a.c_out, false, dtype, x, {op, "scale"});
  const MaybeTensor shift = device::vector(a.shift, a.c_out, false, dtype, x, {op, "shift"});
  int64_t map[2];
  output_map(x, dims.kh, dims.kw, g, op, map);
  device::Output y(x, a.c_out, map[0], map[1]);
  if (y.pixels().numel() == 0) return y.finish();
  conv::gpu::run(scope, {.op = op,
                         .x = in,
                         .weight = device::taps(a.weight),
                         .y = y.pixels(),
                         .dims = dims,
                         .part = part,
                         .geometry = g,
                         .act = act,
                         .bias = bias,
                         .scale = scale,
                         .shift = shift,
                         .samples = x.size(0)});
  return y.finish();
}

}  // namespace
}  // namespace effkern::sliced_conv

EFFKERN_CUDA_OPS(m) {
  m.impl("sliced_conv2d", TORCH_BOX(&effkern::sliced_conv::uniform_conv2d<effkern::sliced_conv::run>));
  m.impl("sliced_linear", TORCH_BOX(&effkern::sliced_conv::uniform_linear<effkern::sliced_conv::run>));
}
