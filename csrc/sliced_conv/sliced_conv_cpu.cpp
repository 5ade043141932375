// sliced_conv2d on the CPU: checks, the running part of the weight, one engine call.
#include <vector>

#include "../common/packed_weight.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

constexpr const char* kOp = "sliced_conv2d";

Tensor sliced_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t c_out,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     int64_t groups, std::string group_mode, const MaybeTensor& scale, const MaybeTensor& shift,
                     std::string act, std::string algo) {
  const conv::Activation in = activation(x, {kOp, "x"});
  const ScalarType dtype = x.scalar_type();
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(weight), kOp, ": weight is a handle; call sliced_conv2d_packed");
  const PackedWeight::Dims dims = PackedWeight::dims(weight, groups, {kOp, "weight"}, &dtype);
  const RunningPart run = running_part(dims, in.c, c_out, group_mode, kOp);
  const Geometry g = geometry(stride, padding, dilation, kOp);
  check_algo(algo, kOp);
  const conv::Act activate = act_from_name(act, kOp);
  const FloatVector b(first(bias, c_out, {kOp, "bias"}), c_out, dtype, {kOp, "bias"});
  const FloatVector factor(first(scale, c_out, {kOp, "scale"}), c_out, dtype, {kOp, "scale"}, /*finite=*/true);
  const FloatVector addend(first(shift, c_out, {kOp, "shift"}), c_out, dtype, {kOp, "shift"});
  int64_t map[2];
  output_map(x, dims.kh, dims.kw, g, kOp, map);

  Tensor y = like_input(x, in.n, c_out, map[0], map[1]);
  if (y.numel() == 0) return y;
  const PackedWeight packed(weight, dims, run);
  std::vector<float> combined;
  conv::Problem problem;
  problem.x = in;
  problem.y = activation(y, {kOp, "y"});
  problem.count = in.n;
  problem.c_in = in.c;
  problem.c_out = c_out;
  packed.attach(problem);
  set_geometry(problem, g);
  problem.epilogue.scale = factor.data();
  problem.epilogue.shift = combined_shift(b.data(), factor.data(), addend.data(), c_out, combined);
  problem.epilogue.act = activate;
  conv::run(problem);
  return y;
}

}  // namespace
}  // namespace effkern::sliced_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("sliced_conv2d", TORCH_BOX(&effkern::sliced_conv::sliced_conv2d)); }
