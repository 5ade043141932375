// conv2d_backward on the CPU: the gradients of act(conv2d(x, running part of weight) + bias + residual) in x, the
// weight, the bias and the residual.
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/packed_weight.h"
#include "../sliced_conv/slice.h"
#include "act_grad.h"
#include "dgrad.h"
#include "wgrad.h"

namespace effkern::conv_backward {
namespace {

constexpr const char* kOp = "conv2d_backward";

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor empty_vector(int64_t size, const Tensor& like, ScalarType dtype) {
  const int64_t sizes[] = {size};
  return torch::stable::empty({sizes, 1}, dtype, std::nullopt, like.device());
}

void check_shape(const conv::Activation& t, const Tensor& tensor, const conv::Activation& x, int64_t c_out,
                 const int64_t map[2], const char* name) {
  EFFKERN_CHECK_VALUE(t.n == x.n && t.c == c_out && t.h == map[0] && t.w == map[1], kOp, ": ", name,
                      " must have the output's shape [", x.n, ", ", c_out, ", ", map[0], ", ", map[1], "], got ",
                      shape_text(tensor));
}

// Channels-last fp32 scratch of gz's shape where nobody wants gz itself.
Tensor scratch_like(const Tensor& gy) {
  const int64_t size[] = {gy.size(0), gy.size(1), gy.size(2), gy.size(3)};
  return torch::stable::empty({size, 4}, ScalarType::Float, std::nullopt, gy.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

Grads conv2d_backward(const Tensor& gy, const MaybeTensor& y, const Tensor& x, const Tensor& weight,
                      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      int64_t groups, Text group_mode, Text act, Text algo, std::vector<bool> needs) {
  const conv::Activation in = activation(x, {kOp, "x"});
  const ScalarType dtype = x.scalar_type();
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(weight), kOp, ": weight must be 4-d, got a handle");
  const PackedWeight::Dims dims = PackedWeight::dims(weight, groups, {kOp, "weight"});
  conv::Activation grad = activation(gy, {kOp, "gy"});
  const int64_t c_out = grad.c;
  const RunningPart part =
      sliced_conv::running_part(dims, in.c, c_out, group_mode, {kOp, "x's channels", "gy's channels"});
  const Geometry g = geometry(stride, padding, dilation, kOp);
  int64_t map[2];
  output_map(x, dims.kh, dims.kw, g, kOp, map);
  check_shape(grad, gy, in, c_out, map, "gy");
  EFFKERN_CHECK_VALUE(needs.size() == 4, kOp, ": needs must have 4 values, got ", needs.size());
  EFFKERN_CHECK_VALUE(act == "none" || act == "relu" || act == "relu6", kOp, ": act must be none, relu or relu6, got '",
                      act, "'");
  const conv::Act activate = act_from_name(act, kOp);
  const conv::Algo algorithm = algo_from_name(algo, kOp);
  EFFKERN_CHECK_VALUE(y.has_value() || activate == conv::Act::None, kOp, ": y must be given for act = '", act, "'");

  EFFKERN_CHECK_VALUE(!needs[3] || activate != conv::Act::None, kOp,
                      ": needs must leave gz out for act = 'none', where it is gy");

  const Tensor nothing = empty_vector(0, x, dtype);
  const Tensor gz = needs[3] ? like_input(x, in.n, c_out, map[0], map[1]) : nothing;
  Tensor scratch = gz;
  if (y.has_value() && activate != conv::Act::None) {
    const conv::Activation out = activation(*y, {kOp, "y"});
    check_shape(out, *y, in, c_out, map, "y");
    if (needs[3]) conv::relu_grad(grad, out, activate, activation(gz, {kOp, "gz"}));
    // The other gradients are made from gz as it was before it was rounded to x's type.
    if (!needs[3] || dtype != gy.scalar_type()) {
      scratch = scratch_like(gy);
      conv::relu_grad(grad, out, activate, activation(scratch, {kOp, "gz"}));
    }
    grad = activation(scratch, {kOp, "gz"});
  }

  Tensor gx = needs[0] ? like_input(x, in.n, in.c, in.h, in.w) : nothing;
  if (needs[0] && gx.numel() > 0) {
    conv::DgradProblem p;
    p.gy = grad;
    p.gx = activation(gx, {kOp, "gx"});
    p.count = in.n;
    p.weight = weight_view(weight, dims, part);
    p.algo = algorithm;
    for (int i = 0; i < 2; ++i) p.stride[i] = g.stride[i], p.pad[i] = g.pad[i], p.dil[i] = g.dil[i];
    conv::dgrad(p);
  }

  Tensor gw = needs[1] ? like_input(weight, dims.out_channels, dims.in_per_group, dims.kh, dims.kw) : nothing;
  Tensor gb = empty_vector(needs[2] ? c_out : 0, x, ScalarType::Float);
  const bool whole = part.groups == dims.groups && part.out_per_group * part.groups == dims.out_channels &&
                     part.in_per_group == dims.in_per_group;
  if (needs[1] && gw.numel() > 0 && !whole)
    std::memset(gw.mutable_data_ptr(), 0, static_cast<size_t>(gw.numel() * gw.element_size()));
  if ((needs[1] || needs[2]) && c_out > 0) {
    conv::WgradProblem p;
    p.x = in;
    p.gy = grad;
    p.count = in.n;
    p.c_in = in.c;
    p.c_out = c_out;
    p.groups = part.groups;
    p.kh = dims.kh;
    p.kw = dims.kw;
    for (int i = 0; i < 2; ++i) p.stride[i] = g.stride[i], p.pad[i] = g.pad[i], p.dil[i] = g.dil[i];
    if (needs[1]) {
      const conv::WeightView view = weight_view(gw, dims, part);
      p.gw = {gw.mutable_data_ptr(), view.dtype, view.group_stride, view.so, view.si, view.sh, view.sw};
    }
    if (needs[2]) p.gb = static_cast<float*>(gb.mutable_data_ptr());
    conv::wgrad(p);
  }
  return {gx, gw, gb, gz};
}

}  // namespace
}  // namespace effkern::conv_backward

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("conv2d_backward", TORCH_BOX(&effkern::conv_backward::conv2d_backward));
}
