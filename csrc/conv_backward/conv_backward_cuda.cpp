// conv2d_backward on CUDA: the activation's slope with the bias's sums, then the gradients of the convolution. All sums
// are fp32.
#include <string>
#include <tuple>
#include <vector>

#include "../common/cuda/rows.h"
#include "../sliced_conv/slice.h"
#include "backward_gpu.h"
#include "gradients_cuda.h"

namespace effkern::conv::gpu {
namespace {

constexpr const char* kOp = "conv2d_backward";

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor flat(int64_t size, ScalarType type, const Tensor& like) {
  return torch::stable::empty({&size, 1}, type, std::nullopt, like.device());
}

// gz where `gz` is given, and the sums of its channels where `gb` is: one pass over gy and y, and one over the slices.
template <class T>
void act_grad(const device::Scope& scope, const Tensor& gy, const Tensor* y, Tensor* gz, Tensor* gb, bool relu6) {
  ActGrad<T> p{};
  p.gy = device::rows<const T>(scope, gy);
  if (y != nullptr) p.y = device::rows<const T>(scope, *y);
  if (gz != nullptr) p.gz = device::rows<T>(scope, *gz);
  p.channels = static_cast<int32_t>(gy.size(1));
  p.slices = device::column_slices<T>(gy.numel() / gy.size(1), p.channels);
  p.relu6 = relu6;
  p.wide = device::wide(p.gy) && device::wide(p.y) && device::wide(p.gz);
  Tensor parts;
  if (gb != nullptr) {
    parts = flat(int64_t{p.slices.count} * p.channels, ScalarType::Float, gy);
    p.sums = scope.of<float>(parts);
  }
  run(p, scope.stream());
  if (gb != nullptr)
    run(FoldSums{scope.of<const float>(parts), scope.of<float>(*gb), p.slices.count, p.channels}, scope.stream());
}

template <class T>
void gradients(const device::Scope& scope, Convolution& c, const Tensor& gy, const Tensor* y, bool relu6, Tensor* gx,
               Tensor* gw, Tensor* gb, Tensor* gz) {
  c.gz = gz != nullptr ? *gz : gy;
  if (y != nullptr || gb != nullptr) act_grad<T>(scope, gy, y, gz, gb, relu6);
  if (gx != nullptr && gx->numel() > 0) input_gradient(scope, c, *gx);
  if (gw != nullptr && c.part.in_per_group > 0) weight_gradient(scope, c, *gw);
}

void check_shape(const Tensor& t, const Tensor& x, int64_t c_out, const int64_t map[2], const char* name) {
  EFFKERN_CHECK_VALUE(
      t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == c_out && t.size(2) == map[0] && t.size(3) == map[1], kOp,
      ": ", name, " must have the output's shape [", x.size(0), ", ", c_out, ", ", map[0], ", ", map[1], "], got ",
      shape_text(t));
}

Grads conv2d_backward(const Tensor& gy, const MaybeTensor& y, const Tensor& x, const Tensor& weight,
                      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      int64_t groups, Text group_mode, Text act, Text algo, std::vector<bool> needs) {
  const device::Scope scope(x, {kOp, "x"});
  const Tensor in = device::pixels(x, x, {kOp, "x"});
  device::check_here(weight, x, {kOp, "weight"});
  Convolution c{};
  c.op = kOp;
  c.dims = weight_dims(weight, groups, {kOp, "weight"});
  EFFKERN_CHECK_VALUE(gy.dim() == 4, kOp, ": gy must be 4-d [N, C, H, W], got shape ", shape_text(gy));
  const int64_t c_out = gy.size(1);
  c.part = sliced_conv::running_part(c.dims, x.size(1), c_out, group_mode, {kOp, "x's channels", "gy's channels"});
  c.geometry = geometry(stride, padding, dilation, kOp);
  int64_t map[2];
  output_map(x, c.dims.kh, c.dims.kw, c.geometry, kOp, map);
  check_shape(gy, x, c_out, map, "gy");
  EFFKERN_CHECK_VALUE(needs.size() == 4, kOp, ": needs must have 4 values, got ", needs.size());
  EFFKERN_CHECK_VALUE(act == "none" || act == "relu" || act == "relu6", kOp, ": act must be none, relu or relu6, got '",
                      act, "'");
  check_algo(algo, kOp);
  EFFKERN_CHECK_VALUE(y.has_value() || act == "none", kOp, ": y must be given for act = '", act, "'");
  EFFKERN_CHECK_VALUE(!needs[3] || act != "none", kOp, ": needs must leave gz out for act = 'none', where it is gy");
  const int64_t pixels = x.size(0) * map[0] * map[1];
  EFFKERN_CHECK_VALUE(pixels <= device::kMostRows && x.size(0) * x.size(2) * x.size(3) <= device::kMostRows, kOp,
                      ": x and gy must have at most ", device::kMostRows, " pixels, got ", pixels);

  // Several types are calculated in fp32.
  const ScalarType dtype = x.scalar_type();
  const bool mixed = gy.scalar_type() != dtype || weight.scalar_type() != dtype;
  const ScalarType math = mixed ? ScalarType::Float : dtype;
  const auto in_math = [&](const Tensor& t) { return t.scalar_type() == math ? t : torch::stable::to(t, math); };
  c.x = in_math(in), c.weight = in_math(weight);
  const bool masked = act != "none";
  const Tensor g =
      in_math(masked || needs[2] ? device::as_rows(gy, x, {kOp, "gy"}) : device::pixels(gy, x, {kOp, "gy"}));
  Tensor out;
  if (masked) {
    check_shape(*y, x, c_out, map, "y");
    out = in_math(device::as_rows(*y, x, {kOp, "y"}));
  }

  const Tensor nothing = flat(0, dtype, x);
  Tensor gb = flat(needs[2] ? c_out : 0, ScalarType::Float, x);
  std::optional<device::Output> gx, gz;
  if (needs[0]) gx.emplace(x, x.size(1), x.size(2), x.size(3), math);
  if (masked) gz.emplace(x, c_out, map[0], map[1], math);
  Tensor gw = nothing;
  if (needs[1])
    gw = device::empty(layout_like(weight, weight.size(0), weight.size(1), weight.size(2), weight.size(3)), math, x);
  if (g.numel() == 0 && gx) torch::stable::zero_(gx->pixels());
  if (g.numel() == 0 || c.part.in_per_group == 0) torch::stable::zero_(gw);
  if (g.numel() == 0) {
    torch::stable::zero_(gb);
  } else {
    device::in_type(math, [&]<class T>(T) {
      gradients<T>(scope, c, g, masked ? &out : nullptr, act == "relu6", gx ? &gx->pixels() : nullptr,
                   needs[1] ? &gw : nullptr, needs[2] ? &gb : nullptr, gz ? &gz->pixels() : nullptr);
    });
  }
  const auto as = [](const Tensor& t, ScalarType type) {
    return t.scalar_type() == type ? t : torch::stable::to(t, type);
  };
  return {gx ? as(gx->finish(), dtype) : nothing, needs[1] ? as(gw, weight.scalar_type()) : nothing, gb,
          needs[3] ? as(gz->finish(), dtype) : nothing};
}

}  // namespace
}  // namespace effkern::conv::gpu

EFFKERN_CUDA_OPS(m) { m.impl("conv2d_backward", TORCH_BOX(&effkern::conv::gpu::conv2d_backward)); }
