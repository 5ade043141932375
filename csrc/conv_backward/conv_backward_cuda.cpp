// conv2d_backward on CUDA. The gradient in the input is the forward kernel over the transposed weight, one launch for
// each residue of the input's position by the stride that any tap meets; those in the weight and the bias are sums over
// slices of the pixels, added in order by a second pass. All sums are fp32.
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../common/cuda/rows.h"
#include "../conv/conv_cuda.h"
#include "../conv/conv_op.h"
#include "../conv/depthwise_gpu.h"
#include "../sliced_conv/slice.h"
#include "wgrad_gpu_plan.h"

namespace effkern::conv::gpu {
namespace {

constexpr const char* kOp = "conv2d_backward";

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The checked question, all tensors of one type.
struct Call {
  Tensor gz, x, weight;  // gz and x with channels side by side
  PackedWeight::Dims dims;
  RunningPart part;
  Geometry geometry;
};

Size2 pair(const int64_t (&v)[2]) { return {static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1])}; }
Size2 map_of(const Tensor& t) { return {static_cast<int32_t>(t.size(2)), static_cast<int32_t>(t.size(3))}; }
Strides strides(const Tensor& t) { return {t.stride(0), t.stride(2), t.stride(3)}; }

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

// Along one axis: the taps an input position p with p % stride == residue meets are those k with k % step == r, from
// the last to the first those at output position p / stride - pad + j * dilation.
struct Phase {
  int32_t r, taps;  // taps 0: none
  int32_t pad, dilation, out;
};

Phase phase_of(int64_t residue, int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t step = stride / std::gcd(stride, dilation);
  for (int64_t r = 0; r < std::min(step, kernel); ++r) {
    if ((residue + pad - r * dilation) % stride != 0) continue;
    const int64_t taps = (kernel - r + step - 1) / step, apart = step * dilation / stride;
    const int64_t first = (residue + pad - r * dilation) / stride;  // where tap r is met by the first position
    return {static_cast<int32_t>(r), static_cast<int32_t>(taps), static_cast<int32_t>((taps - 1) * apart - first),
            static_cast<int32_t>(apart), static_cast<int32_t>((in - residue + stride - 1) / stride)};
  }
  return {};
}

// A view of every stride-th position of gx.
void set_phase(auto& p, const Phase& down, const Phase& across, int64_t h, int64_t w, const Geometry& g,
               const Strides& gx) {
  p.y = p.y + (h * gx.h + w * gx.w);
  p.ys = {gx.n, g.stride[0] * gx.h, g.stride[1] * gx.w};
  p.out = {down.out, across.out}, p.kernel = {down.taps, across.taps}, p.stride = {1, 1};
  p.pad = {down.pad, across.pad}, p.dilation = {down.dilation, across.dilation};
}

template <class T>
void input_gradient(const device::Scope& scope, const Call& c, Tensor& gx) {
  const Geometry& g = c.geometry;
  const Size2 kernel{static_cast<int32_t>(c.dims.kh), static_cast<int32_t>(c.dims.kw)};
  const Size2 step{static_cast<int32_t>(g.stride[0] / std::gcd(g.stride[0], g.dil[0])),
                   static_cast<int32_t>(g.stride[1] / std::gcd(g.stride[1], g.dil[1]))};
  const int32_t c_out = static_cast<int32_t>(c.part.out_per_group), c_in = static_cast<int32_t>(c.part.in_per_group);
  const int64_t group_rows = c.dims.out_channels / c.dims.groups;
  const Tensor& w = c.weight;

  // Depthwise filters are read backwards where they lie.
  DepthwiseProblem<T> one{};
  one.x = scope.of<const T>(c.gz), one.xs = strides(c.gz), one.y = scope.of<T>(gx);
  one.weight = scope.of<const T>(w), one.weight_channel = w.stride(0);
  one.in = map_of(c.gz), one.samples = static_cast<int32_t>(gx.size(0));
  one.channels = static_cast<int32_t>(c.part.groups);
  one.wide_x = detail::in_chunks(one.x.p, one.xs);

  Problem<T> p{};
  p.x = one.x, p.xs = one.xs, p.y = one.y, p.in = one.in, p.act = Act::None;
  p.groups = static_cast<int32_t>(c.part.groups), p.group_rows = c_in;
  p.whole = {c_out, c_in, 0, static_cast<int32_t>(gx.size(0))};
  Tensor turned;
  const auto turn = [&] {
    const int64_t per = device::kPerChunk<T>, pitch = (c_out + per - 1) / per * per;
    const int64_t taps = int64_t{kernel.h} * kernel.w;
    turned = flat(c.part.groups * c_in * taps * pitch, c.x.scalar_type(), c.x);
    p.weight_tap = pitch, p.weight_row = taps * pitch;
    run(Transpose<T>{scope.of<const T>(w), w.stride(0), w.stride(1), w.stride(2), w.stride(3), scope.of<T>(turned),
                     p.groups, static_cast<int32_t>(group_rows), c_out, c_in, static_cast<int32_t>(pitch), kernel,
                     step},
        scope.stream());
  };

  const bool meets_all = g.stride[0] / std::gcd(g.stride[0], g.dil[0]) == g.stride[0] && kernel.h >= g.stride[0] &&
                         g.stride[1] / std::gcd(g.stride[1], g.dil[1]) == g.stride[1] && kernel.w >= g.stride[1];
  if (!meets_all) torch::stable::zero_(gx);  // positions that no tap meets
  for (int64_t h = 0; h < std::min(g.stride[0], gx.size(2)); ++h) {
    const Phase down = phase_of(h, gx.size(2), kernel.h, g.stride[0], g.pad[0], g.dil[0]);
    for (int64_t v = 0; down.taps > 0 && v < std::min(g.stride[1], gx.size(3)); ++v) {
      const Phase across = phase_of(v, gx.size(3), kernel.w, g.stride[1], g.pad[1], g.dil[1]);
      if (across.taps == 0) continue;
      if (is_depthwise(c.part) && group_rows == 1) {
        DepthwiseProblem<T> d = one;
        set_phase(d, down, across, h, v, g, strides(gx));
        d.weight = d.weight + ((down.r + (down.taps - 1) * step.h) * w.stride(2) +
                               (across.r + (across.taps - 1) * step.w) * w.stride(3));
        d.weight_h = -step.h * w.stride(2), d.weight_w = -step.w * w.stride(3);
        d.wide_y = detail::in_chunks<T>(d.y.p, d.ys);
        d.strips = strips_for(d.out.w);
        if (fits(d)) {
          run(d, scope.stream());
          continue;
        }
      }
      if (p.weight_tap == 0) turn();
      Problem<T> q = p;
      set_phase(q, down, across, h, v, g, strides(gx));
      q.weight = scope.of<const T>(turned) + class_place(kernel, step, {down.r, across.r}) * p.weight_tap;
      if constexpr (std::is_same_v<T, float>)
        run(q, tf32() ? Math::TF32 : Math::F32, scope.stream());
      else
        run(q, scope.stream());
    }
  }
}

template <class T>
void weight_gradient(const device::Scope& scope, const Call& c, Tensor& gw) {
  Wgrad<T> p{};
  p.x = scope.of<const T>(c.x), p.xs = strides(c.x);
  p.gz = scope.of<const T>(c.gz), p.gs = strides(c.gz);
  p.in = map_of(c.x), p.out = map_of(c.gz);
  p.kernel = {static_cast<int32_t>(c.dims.kh), static_cast<int32_t>(c.dims.kw)};
  p.stride = pair(c.geometry.stride), p.pad = pair(c.geometry.pad), p.dilation = pair(c.geometry.dil);
  p.groups = static_cast<int32_t>(c.part.groups);
  p.c_in = static_cast<int32_t>(c.part.in_per_group), p.c_out = static_cast<int32_t>(c.part.out_per_group);
  const int64_t pixels = c.gz.size(0) * p.out.h * p.out.w, taps = c.dims.kh * c.dims.kw;
  const bool depthwise = is_depthwise(c.part);
  if (depthwise) {
    p.tap_columns = 1, p.columns = static_cast<int32_t>(taps);
    p.slices = device::column_slices<T>(pixels, p.groups * ((taps + 8) / 9));
    p.wide = detail::in_chunks(p.x.p, p.xs) && detail::in_chunks(p.gz.p, p.gs);
  } else {
    const WgradPlan plan = wgrad_plan(p, pixels);
    p.tap_columns = plan.tap_columns, p.columns = plan.columns, p.slices = plan.slices;
  }
  const int64_t part = int64_t{p.groups} * p.c_out * p.columns;
  const Tensor parts = flat(part * p.slices.count, ScalarType::Float, c.x);
  p.parts = scope.of<float>(parts);
  if (depthwise)
    run_depthwise(p, scope.stream());
  else if constexpr (std::is_same_v<T, float>)
    run(p, tf32() ? Math::TF32 : Math::F32, scope.stream());
  else
    run(p, scope.stream());
  const int64_t rows = c.dims.out_channels / c.dims.groups;
  run(Fold<T>{p.parts, part, p.slices.count, scope.of<T>(gw), gw.stride(0), gw.stride(1), gw.stride(2), gw.stride(3),
              gw.numel(), static_cast<int32_t>(c.dims.in_per_group), static_cast<int32_t>(rows), p.groups, p.c_in,
              p.c_out, p.tap_columns, p.columns, p.kernel.w, static_cast<int32_t>(taps)},
      scope.stream());
}

template <class T>
void gradients(const device::Scope& scope, Call& c, const Tensor& gy, const Tensor* y, bool relu6, Tensor* gx,
               Tensor* gw, Tensor* gb, Tensor* gz) {
  c.gz = gz != nullptr ? *gz : gy;
  if (y != nullptr || gb != nullptr) act_grad<T>(scope, gy, y, gz, gb, relu6);
  if (gx != nullptr && gx->numel() > 0) input_gradient<T>(scope, c, *gx);
  if (gw != nullptr && c.part.in_per_group > 0) weight_gradient<T>(scope, c, *gw);
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
  Call c;
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
