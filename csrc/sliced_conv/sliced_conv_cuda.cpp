// Uniform sliced convolution and linear layer on CUDA: the weight's running part is read in place.
#include <string>
#include <vector>

#include "../conv/conv_op.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

struct Arguments {
  WidthNames names;
  const Tensor &x, &weight;
  const MaybeTensor& bias;
  int64_t c_out;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  std::string group_mode;
  const MaybeTensor &scale, &shift;
  std::string act, algo;
};

Tensor run(const Arguments& a) {
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

Tensor conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t c_out,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
              std::string group_mode, const MaybeTensor& scale, const MaybeTensor& shift, std::string act,
              std::string algo) {
  return run({{"sliced_conv2d", "x's channels", "c_out"},
              x,
              weight,
              bias,
              c_out,
              stride,
              padding,
              dilation,
              groups,
              group_mode,
              scale,
              shift,
              act,
              algo});
}

Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t out_features,
              const MaybeTensor& scale, const MaybeTensor& shift, std::string act, std::string algo) {
  constexpr const char* op = "sliced_linear";
  const Tensor maps = as_map(x, {op, "x"}), kernel = as_map(weight, {op, "weight"});
  return torch::stable::flatten(run({{op, "x's features", "out_features"},
                                     maps,
                                     kernel,
                                     bias,
                                     out_features,
                                     {1, 1},
                                     {0, 0},
                                     {1, 1},
                                     1,
                                     "prefix_groups",
                                     scale,
                                     shift,
                                     act,
                                     algo}),
                                1, -1);
}

}  // namespace
}  // namespace effkern::sliced_conv

EFFKERN_CUDA_OPS(m) {
  m.impl("sliced_conv2d", TORCH_BOX(&effkern::sliced_conv::conv2d));
  m.impl("sliced_linear", TORCH_BOX(&effkern::sliced_conv::linear));
}
