// A depthwise and the pointwise convolution behind it on the CPU: one pass where that is faster, else one after the
// other; the bits are the same.
#include <vector>

#include "../common/packed_weight.h"
#include "../conv/dw_pw.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

// One of the two convolutions: its weight whole, or a handle, which carries its own bias.
struct Conv {
  const char *weight_name, *bias_name, *scale_name, *shift_name;
  const Tensor& weight;
  const MaybeTensor &bias, &scale, &shift;
  std::string act;
};

// A convolution at the widths of the call, ready to run.
class Part {
 public:
  Part(const Conv& conv, const PackedWeight::Dims& dims, const RunningPart& part, ScalarType dtype, const char* op)
      : dims_(dims),
        part_(part),
        bias_(first(conv.bias, outputs(), dtype, {op, conv.bias_name})),
        scale_(first(conv.scale, outputs(), dtype, {op, conv.scale_name}, /*finite=*/true)),
        shift_(first(conv.shift, outputs(), dtype, {op, conv.shift_name})),
        weight_(conv.weight, dims, part),
        act_(act_from_name(conv.act, op)) {
    const float* added = bias_ ? bias_.data() : weight_.bias();
    if (added == nullptr) return;
    combined_.resize(static_cast<size_t>(outputs()));
    add_bias(added, scale_.data(), shift_.data(), dims, part, combined_.data());
  }

  conv::Problem problem(const conv::Activation& x, const conv::Activation& y) const {
    conv::Problem p;
    p.x = x, p.y = y;
    p.count = y.n;
    p.c_in = x.c, p.c_out = outputs();
    weight_.attach(p);
    p.epilogue.scale = scale_.data();
    p.epilogue.shift = combined_.empty() ? shift_.data() : combined_.data();
    p.epilogue.act = act_;
    return p;
  }

 private:
  int64_t outputs() const { return part_.groups * part_.out_per_group; }

  PackedWeight::Dims dims_;
  RunningPart part_;
  FloatVector bias_, scale_, shift_;
  PackedWeight weight_;
  conv::Act act_;
  std::vector<float> combined_;
};

struct Arguments {
  const char* op;
  const Tensor& x;
  Conv dw, pw;
  int64_t channels;  // of the whole depthwise weight
  int64_t c_out;
  std::vector<int64_t> stride, padding, dilation;
  const MaybeTensor& residual;
  std::string algo;
};

Tensor run(const Arguments& a) {
  const char* op = a.op;
  const conv::Activation x = activation(a.x, {op, "x"});
  const ScalarType dtype = a.x.scalar_type();
  const auto dims_of = [&](const Conv& conv, int64_t groups) {
    const bool handle = PackedWeight::is_handle(conv.weight);
    return PackedWeight::dims(conv.weight, groups, {op, conv.weight_name}, handle ? nullptr : &dtype);
  };
  const PackedWeight::Dims dw = dims_of(a.dw, a.channels), pw = dims_of(a.pw, 1);
  EFFKERN_CHECK_VALUE(dw.out_channels == a.channels && dw.in_per_group == 1, op, ": ", a.dw.weight_name,
                      " must be depthwise, [C, 1, kh, kw], got [", dw.out_channels, ", ", dw.in_per_group, ", ", dw.kh,
                      ", ", dw.kw, "]");
  EFFKERN_CHECK_VALUE(pw.kh == 1 && pw.kw == 1, op, ": ", a.pw.weight_name, " must have a 1x1 kernel, got ", pw.kh, "x",
                      pw.kw);
  const RunningPart dw_part = running_part(dw, x.c, x.c, "prefix_groups", {op, "x's channels", "x's channels"});
  const RunningPart pw_part = running_part(pw, x.c, a.c_out, "prefix_groups", {op, "x's channels", "c_out"});
  const Geometry g = geometry(a.stride, a.padding, a.dilation, op);
  check_algo(a.algo, op);
  int64_t map[2];
  output_map(a.x, dw.kh, dw.kw, g, op, map);
  conv::Activation addend;
  if (a.residual.has_value()) {
    addend = activation(*a.residual, {op, "residual"});
    EFFKERN_CHECK_TYPE(a.residual->scalar_type() == dtype, op, ": residual must have x's dtype");
    EFFKERN_CHECK_VALUE(addend.n == x.n && addend.c == a.c_out && addend.h == map[0] && addend.w == map[1], op,
                        ": residual must have the output's shape [", x.n, ", ", a.c_out, ", ", map[0], ", ", map[1],
                        "], got ", shape_text(*a.residual));
  }
  const Part filter(a.dw, dw, dw_part, dtype, op), mix(a.pw, pw, pw_part, dtype, op);
  Tensor y = like_input(a.x, x.n, a.c_out, map[0], map[1]);
  if (y.numel() == 0) return y;

  conv::Activation between;  // its size; memory only where the pair does not run fused
  between.n = x.n, between.c = x.c, between.h = map[0], between.w = map[1];
  conv::Problem depthwise = filter.problem(x, between);
  set_geometry(depthwise, g);
  conv::Problem pointwise = mix.problem(between, activation(y, {op, "y"}));
  if (a.residual.has_value()) pointwise.epilogue.residual = &addend;
  if (conv::can_fuse(depthwise, pointwise)) {
    conv::run_fused(depthwise, pointwise);
    return y;
  }
  const Tensor maps = like_input(a.x, x.n, x.c, map[0], map[1]);
  depthwise.y = pointwise.x = activation(maps, {op, "maps"});
  if (maps.numel() != 0) conv::run(depthwise);
  conv::run(pointwise);
  return y;
}

Tensor dw_pw(const Tensor& x, const Tensor& dw_weight, const MaybeTensor& dw_bias, const Tensor& pw_weight,
             const MaybeTensor& pw_bias, int64_t c_out, std::vector<int64_t> stride, std::vector<int64_t> padding,
             std::vector<int64_t> dilation, const MaybeTensor& dw_scale, const MaybeTensor& dw_shift, Text dw_act,
             const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& residual, Text act, Text algo) {
  const char* op = "sliced_dw_pw";
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(dw_weight) && !PackedWeight::is_handle(pw_weight), op,
                      ": a weight is a handle; call sliced_dw_pw_packed");
  EFFKERN_CHECK_VALUE(dw_weight.dim() == 4, op, ": dw_weight must be 4-d [C, 1, kh, kw], got shape ",
                      shape_text(dw_weight));
  EFFKERN_CHECK_VALUE(dw_weight.size(0) > 0, op, ": dw_weight must have at least one channel");
  return run({op,
              x,
              {"dw_weight", "dw_bias", "dw_scale", "dw_shift", dw_weight, dw_bias, dw_scale, dw_shift, dw_act},
              {"pw_weight", "pw_bias", "scale", "shift", pw_weight, pw_bias, scale, shift, act},
              dw_weight.size(0),
              c_out,
              stride,
              padding,
              dilation,
              residual,
              algo});
}

Tensor dw_pw_packed(const Tensor& x, const Tensor& dw_handle, const Tensor& pw_handle, int64_t channels,
                    std::vector<int64_t> kernel_size, int64_t out_channels, int64_t c_out, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation, const MaybeTensor& dw_scale,
                    const MaybeTensor& dw_shift, Text dw_act, const MaybeTensor& scale, const MaybeTensor& shift,
                    const MaybeTensor& residual, Text act, Text algo) {
  const char* op = "sliced_dw_pw_packed";
  const MaybeTensor none;
  check_handle(dw_handle, channels, kernel_size, channels, op);
  check_handle(pw_handle, out_channels, {1, 1}, 1, op);
  return run({op,
              x,
              {"dw_handle", "dw_bias", "dw_scale", "dw_shift", dw_handle, none, dw_scale, dw_shift, dw_act},
              {"pw_handle", "pw_bias", "scale", "shift", pw_handle, none, scale, shift, act},
              channels,
              c_out,
              stride,
              padding,
              dilation,
              residual,
              algo});
}

}  // namespace
}  // namespace effkern::sliced_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("sliced_dw_pw", TORCH_BOX(&effkern::sliced_conv::dw_pw));
  m.impl("sliced_dw_pw_packed", TORCH_BOX(&effkern::sliced_conv::dw_pw_packed));
}
