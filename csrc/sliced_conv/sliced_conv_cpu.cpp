// Uniform sliced convolution and linear layer on the CPU: checks, the running part of the weight, one engine call.
#include <vector>

#include "../common/packed_weight.h"
#include "calls.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

Tensor run(const UniformArguments& a) {
  const char* op = a.names.op;
  const conv::Activation in = activation(a.x, {op, "x"});
  const ScalarType dtype = a.x.scalar_type();
  const bool handle = PackedWeight::is_handle(a.weight);
  const PackedWeight::Dims dims = PackedWeight::dims(a.weight, a.groups, {op, "weight"}, handle ? nullptr : &dtype);
  const RunningPart part = running_part(dims, in.c, a.c_out, a.group_mode, a.names);
  const Geometry g = geometry(a.stride, a.padding, a.dilation, op);
  const conv::Algo algo = algo_from_name(a.algo, op);
  const conv::Act act = act_from_name(a.act, op);
  const int64_t bias_elements = bias_size(dims, part);
  const FloatVector bias(first(a.bias, bias_elements, {op, "bias"}), bias_elements, dtype, {op, "bias"});
  const FloatVector scale(first(a.scale, a.c_out, {op, "scale"}), a.c_out, dtype, {op, "scale"}, /*finite=*/true);
  const FloatVector shift(first(a.shift, a.c_out, {op, "shift"}), a.c_out, dtype, {op, "shift"});
  int64_t map[2];
  output_map(a.x, dims.kh, dims.kw, g, op, map);

  Tensor y = like_input(a.x, in.n, a.c_out, map[0], map[1]);
  if (y.numel() == 0) return y;
  const PackedWeight packed(a.weight, dims, part);
  const float* added = bias ? bias.data() : packed.bias();
  std::vector<float> combined;
  if (added != nullptr) {
    combined.resize(static_cast<size_t>(a.c_out));
    add_bias(added, scale.data(), shift.data(), dims, part, combined.data());
  }
  conv::Problem problem;
  problem.algo = algo;
  problem.x = in;
  problem.y = activation(y, {op, "y"});
  problem.count = in.n;
  problem.c_in = in.c;
  problem.c_out = a.c_out;
  packed.attach(problem);
  set_geometry(problem, g);
  problem.epilogue.scale = scale.data();
  problem.epilogue.shift = added != nullptr ? combined.data() : shift.data();
  problem.epilogue.act = act;
  conv::run(problem);
  return y;
}

Tensor run_weight(const UniformArguments& a) {
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(a.weight), a.names.op,
                      ": weight is a handle; call sliced_conv2d_packed");
  return run(a);
}

Tensor conv2d_packed(const Tensor& x, const Tensor& handle, int64_t out_channels, std::vector<int64_t> kernel_size,
                     int64_t c_out, std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, Text group_mode, const MaybeTensor& scale,
                     const MaybeTensor& shift, Text act, Text algo) {
  const char* op = "sliced_conv2d_packed";
  check_handle(handle, out_channels, kernel_size, groups, op);
  return run({{op, "x's channels", "c_out"},
              x,
              handle,
              std::nullopt,
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

}  // namespace
}  // namespace effkern::sliced_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("sliced_conv2d", TORCH_BOX(&effkern::sliced_conv::uniform_conv2d<effkern::sliced_conv::run_weight>));
  m.impl("sliced_conv2d_packed", TORCH_BOX(&effkern::sliced_conv::conv2d_packed));
  m.impl("sliced_linear", TORCH_BOX(&effkern::sliced_conv::uniform_linear<effkern::sliced_conv::run_weight>));
}
