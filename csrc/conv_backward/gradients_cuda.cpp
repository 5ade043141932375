// The gradient in the input is the forward kernel over the transposed weight, one launch for each residue of the
// input's position by the stride that any tap meets; that in the weight is sums over slices of the pixels, added in
// order by a second pass.
#include "gradients_cuda.h"

#include <numeric>

#include "../common/cuda/rows.h"
#include "../conv/conv_cuda.h"
#include "../conv/depthwise_gpu.h"
#include "wgrad_gpu_plan.h"

namespace effkern::conv::gpu {
namespace {

Size2 pair(const int64_t (&v)[2]) { return {static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1])}; }
Size2 map_of(const Tensor& t) { return {static_cast<int32_t>(t.size(2)), static_cast<int32_t>(t.size(3))}; }
Strides strides(const Tensor& t) { return {t.stride(0), t.stride(2), t.stride(3)}; }

Tensor flat(int64_t size, ScalarType type, const Tensor& like) {
  return torch::stable::empty({&size, 1}, type, std::nullopt, like.device());
}

template <class T>
Global<const T> maybe(const device::Scope& scope, const MaybeTensor& tensor) {
  return tensor.has_value() ? scope.of<const T>(*tensor) : Global<const T>();
}

Global<const Part> classes(const device::Scope& scope, const Listed& listed) {
  return listed.parts ? scope.of<const int32_t>(*listed.parts).template as<const Part>() : Global<const Part>();
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
void input_gradient_of(const device::Scope& scope, const Convolution& c, Tensor& gx, const Listed& listed,
                       const MaybeTensor& addend, int64_t copied) {
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
  if (c.c_in && !listed.parts) {
    one.c_in = indices(scope, *c.c_out, c.x, {c.op, "c_out"}), one.c_out = indices(scope, *c.c_in, c.x, {c.op, "c_in"});
    one.zero_to = static_cast<int32_t>(gx.size(1));
  }

  Problem<T> p{};
  p.x = one.x, p.xs = one.xs, p.y = one.y, p.in = one.in, p.act = Act::None;
  p.groups = static_cast<int32_t>(c.part.groups), p.group_rows = c_in;
  p.whole = {c_out, c_in, 0, static_cast<int32_t>(gx.size(0))};
  p.x_rows = p.y_rows = p.residual_rows = maybe<int32_t>(scope, listed.rows);
  p.count = maybe<int32_t>(scope, listed.count);
  p.parts = classes(scope, listed), p.part_count = maybe<int32_t>(scope, listed.part_count);
  p.zero_to = listed.parts ? static_cast<int32_t>(gx.size(1)) : 0;
  if (addend) p.residual = scope.of<const T>(*addend), p.rs = strides(*addend);
  p.copied = static_cast<int32_t>(copied);
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
        EFFKERN_CHECK_VALUE(!one.c_in.words, c.op,
                            ": this kernel, stride or dilation is too large on the GPU where widths differ by sample");
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
void weight_gradient_of(const device::Scope& scope, const Convolution& c, Tensor& gw, const Listed& listed) {
  Wgrad<T> p{};
  p.x = scope.of<const T>(c.x), p.xs = strides(c.x);
  p.gz = scope.of<const T>(c.gz), p.gs = strides(c.gz);
  p.in = map_of(c.x), p.out = map_of(c.gz);
  p.kernel = {static_cast<int32_t>(c.dims.kh), static_cast<int32_t>(c.dims.kw)};
  p.stride = pair(c.geometry.stride), p.pad = pair(c.geometry.pad), p.dilation = pair(c.geometry.dil);
  p.groups = static_cast<int32_t>(c.part.groups);
  p.c_in = static_cast<int32_t>(c.part.in_per_group), p.c_out = static_cast<int32_t>(c.part.out_per_group);
  if (c.c_in) p.in_of = indices(scope, *c.c_in, c.x, {c.op, "c_in"});
  if (c.c_out) p.out_of = indices(scope, *c.c_out, c.x, {c.op, "c_out"});
  p.rows = maybe<int32_t>(scope, listed.rows), p.count = maybe<int32_t>(scope, listed.count);
  p.classes = classes(scope, listed), p.class_count = maybe<int32_t>(scope, listed.part_count);
  const int64_t pixels = c.gz.size(0) * p.out.h * p.out.w, taps = c.dims.kh * c.dims.kw;
  EFFKERN_CHECK_VALUE(pixels <= device::kMostRows && c.x.size(0) * c.x.size(2) * c.x.size(3) <= device::kMostRows, c.op,
                      ": x and the output must have at most ", device::kMostRows, " pixels, got ", pixels);
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
  device::in_type(gw.scalar_type(), [&]<class U>(U) {
    run(Fold<U>{p.parts, part, p.slices.count, scope.of<U>(gw), gw.stride(0), gw.stride(1), gw.stride(2), gw.stride(3),
                gw.numel(), static_cast<int32_t>(c.dims.in_per_group), static_cast<int32_t>(rows), p.groups, p.c_in,
                p.c_out, p.tap_columns, p.columns, p.kernel.w, static_cast<int32_t>(taps)},
        scope.stream());
  });
}

}  // namespace

void input_gradient(const device::Scope& scope, const Convolution& c, Tensor& gx, const Listed& listed,
                    const MaybeTensor& addend, int64_t copied) {
  device::in_type(c.x.scalar_type(), [&]<class T>(T) { input_gradient_of<T>(scope, c, gx, listed, addend, copied); });
}

void weight_gradient(const device::Scope& scope, const Convolution& c, Tensor& gw, const Listed& listed) {
  device::in_type(c.x.scalar_type(), [&]<class T>(T) { weight_gradient_of<T>(scope, c, gw, listed); });
}

}  // namespace effkern::conv::gpu
