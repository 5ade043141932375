// A depthwise convolution and the pointwise one behind it on CUDA: a launch each. What is between them has x's dtype
// and goes through memory; the weights' running parts are read in place.
#include <string>
#include <vector>

#include "../conv/conv_op.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

constexpr const char* kOp = "sliced_dw_pw";

// One of the two convolutions, its arguments checked.
struct Part {
  PackedWeight::Dims dims;
  conv::Act act;
  RunningPart part = {};
  MaybeTensor bias = {}, scale = {}, shift = {};
};

Part part_of(const Tensor& x, const Tensor& weight, const char* name, int64_t groups, int64_t c_out,
             const char* c_out_name, const MaybeTensor (&vectors)[3], const char* const (&names)[3],
             const std::string& act) {
  const ScalarType dtype = x.scalar_type();
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(weight), kOp, ": a weight is a handle; call sliced_dw_pw_packed");
  device::check_here(weight, x, {kOp, name});
  Part p{weight_dims(weight, groups, {kOp, name}, &dtype), act_from_name(act, kOp)};
  p.part = running_part(p.dims, x.size(1), c_out, "prefix_groups", {kOp, "x's channels", c_out_name});
  const auto vector = [&](int i) { return device::vector(vectors[i], c_out, false, dtype, x, {kOp, names[i]}); };
  p.bias = vector(0), p.scale = vector(1), p.shift = vector(2);
  return p;
}

Tensor dw_pw(const Tensor& x, const Tensor& dw_weight, const MaybeTensor& dw_bias, const Tensor& pw_weight,
             const MaybeTensor& pw_bias, int64_t c_out, std::vector<int64_t> stride, std::vector<int64_t> padding,
             std::vector<int64_t> dilation, const MaybeTensor& dw_scale, const MaybeTensor& dw_shift, Text dw_act,
             const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& residual, Text act, Text algo) {
  const device::Scope scope(x, {kOp, "x"});
  const Tensor in = device::pixels(x, x, {kOp, "x"});
  const ScalarType dtype = x.scalar_type();
  const int64_t n = x.size(0), c_mid = x.size(1);
  EFFKERN_CHECK_VALUE(dw_weight.dim() == 4 && dw_weight.size(0) > 0 && dw_weight.size(1) == 1, kOp,
                      ": dw_weight must be depthwise, [C, 1, kh, kw], got shape ", shape_text(dw_weight));
  const Part dw = part_of(x, dw_weight, "dw_weight", dw_weight.size(0), c_mid, "x's channels",
                          {dw_bias, dw_scale, dw_shift}, {"dw_bias", "dw_scale", "dw_shift"}, dw_act);
  const Part pw = part_of(x, pw_weight, "pw_weight", 1, c_out, "c_out", {pw_bias, scale, shift},
                          {"pw_bias", "scale", "shift"}, act);
  EFFKERN_CHECK_VALUE(pw.dims.kh == 1 && pw.dims.kw == 1, kOp, ": pw_weight must have a 1x1 kernel, got ", pw.dims.kh,
                      "x", pw.dims.kw);
  const Geometry g = geometry(stride, padding, dilation, kOp);
  check_algo(algo, kOp);
  int64_t map[2];
  output_map(x, dw.dims.kh, dw.dims.kw, g, kOp, map);
  MaybeTensor addend;
  if (residual.has_value()) {
    addend = device::pixels(*residual, x, {kOp, "residual"});
    EFFKERN_CHECK_TYPE(residual->scalar_type() == dtype, kOp, ": residual must have x's dtype");
    EFFKERN_CHECK_VALUE(residual->size(0) == n && residual->size(1) == c_out && residual->size(2) == map[0] &&
                            residual->size(3) == map[1],
                        kOp, ": residual must have the output's shape [", n, ", ", c_out, ", ", map[0], ", ", map[1],
                        "], got ", shape_text(*residual));
  }
  device::Output y(x, c_out, map[0], map[1]);
  if (y.pixels().numel() == 0) return y.finish();

  const Tensor maps =
      device::empty({{n, c_mid, map[0], map[1]}, {map[0] * map[1] * c_mid, 1, map[1] * c_mid, c_mid}}, dtype, x);
  const auto run = [&](const Part& p, const Tensor& from, const Tensor& weight, const Tensor& to, const Geometry& g,
                       const MaybeTensor& residual) {
    conv::gpu::run(scope, {.op = kOp,
                           .x = from,
                           .weight = device::taps(weight),
                           .y = to,
                           .dims = p.dims,
                           .part = p.part,
                           .geometry = g,
                           .act = p.act,
                           .residual = residual,
                           .bias = p.bias,
                           .scale = p.scale,
                           .shift = p.shift,
                           .samples = n});
  };
  if (maps.numel() > 0) run(dw, in, dw_weight, maps, g, {});
  run(pw, maps, pw_weight, y.pixels(), {{1, 1}, {0, 0}, {1, 1}}, addend);
  return y.finish();
}

}  // namespace
}  // namespace effkern::sliced_conv

EFFKERN_CUDA_OPS(m) { m.impl("sliced_dw_pw", TORCH_BOX(&effkern::sliced_conv::dw_pw)); }
