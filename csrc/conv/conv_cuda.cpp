#include "conv_cuda.h"

#include <cstdlib>
#include <cstring>

#include "conv_gpu_plan.h"
#include "conv_op.h"
#include "depthwise_gpu.h"

namespace effkern::conv::gpu {
namespace {

Size2 pair(const int64_t (&v)[2]) { return {static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1])}; }

// Nothing is at a distance along a side of one pixel, whatever its stride says: rows of a linear layer are aligned.
Strides strides(const Tensor& map) {
  return {map.stride(0), map.size(2) > 1 ? map.stride(2) : 0, map.size(3) > 1 ? map.stride(3) : 0};
}

template <class T>
Global<T> maybe(const device::Scope& scope, const MaybeTensor& tensor) {
  return tensor.has_value() ? scope.of<T>(*tensor) : Global<T>();
}

template <class T>
Problem<T> problem(const device::Scope& scope, const Question& q) {
  Problem<T> p{};
  p.x = scope.of<const T>(q.x), p.xs = strides(q.x);
  p.weight = scope.of<const T>(q.weight);
  p.y = scope.of<T>(q.y), p.ys = strides(q.y);
  if (q.residual) p.residual = scope.of<const T>(*q.residual), p.rs = strides(*q.residual);
  const bool one = q.dims.kh * q.dims.kw == 1;  // then no tap follows another, whatever the strides of size 1 are
  p.weight_tap = one ? 0 : q.dims.kw > 1 ? q.weight.stride(3) : q.weight.stride(2);
  p.weight_row = q.weight.size(0) > 1 ? q.weight.stride(0) : 0;
  p.groups = static_cast<int32_t>(q.part.groups);
  p.group_rows = static_cast<int32_t>(q.dims.out_channels / q.dims.groups);
  p.in = {static_cast<int32_t>(q.x.size(2)), static_cast<int32_t>(q.x.size(3))};
  p.out = {static_cast<int32_t>(q.y.size(2)), static_cast<int32_t>(q.y.size(3))};
  p.kernel = {static_cast<int32_t>(q.dims.kh), static_cast<int32_t>(q.dims.kw)};
  p.stride = pair(q.geometry.stride), p.pad = pair(q.geometry.pad), p.dilation = pair(q.geometry.dil);
  p.whole = {static_cast<int32_t>(q.part.in_per_group), static_cast<int32_t>(q.part.out_per_group), 0,
             static_cast<int32_t>(q.samples)};
  p.count = maybe<const int32_t>(scope, q.count);
  if (q.parts) p.parts = scope.of<const int32_t>(*q.parts).template as<const Part>();
  p.part_count = maybe<const int32_t>(scope, q.part_count);
  p.x_rows = maybe<const int32_t>(scope, q.x_rows), p.y_rows = maybe<const int32_t>(scope, q.y_rows);
  p.residual_rows = maybe<const int32_t>(scope, q.residual_rows);
  p.zero_to = static_cast<int32_t>(q.zero_to);
  p.bias = maybe<const float>(scope, q.bias);
  p.scale = maybe<const float>(scope, q.scale), p.shift = maybe<const float>(scope, q.shift);
  p.table_stride = q.table_stride, p.table_row = maybe<const int32_t>(scope, q.table_row);
  p.act = static_cast<Act>(q.act);
  p.gate = maybe<const float>(scope, q.gate);
  p.copied = static_cast<int32_t>(q.copied);
  return p;
}

template <class T>
DepthwiseProblem<T> depthwise_problem(const device::Scope& scope, const Question& q) {
  DepthwiseProblem<T> p{};
  p.x = scope.of<const T>(q.x), p.xs = strides(q.x);
  p.weight = scope.of<const T>(q.weight);
  p.weight_channel = q.weight.stride(0), p.weight_h = q.weight.stride(2), p.weight_w = q.weight.stride(3);
  p.y = scope.of<T>(q.y), p.ys = strides(q.y);
  if (q.residual) p.residual = scope.of<const T>(*q.residual), p.rs = strides(*q.residual);
  p.in = {static_cast<int32_t>(q.x.size(2)), static_cast<int32_t>(q.x.size(3))};
  p.out = {static_cast<int32_t>(q.y.size(2)), static_cast<int32_t>(q.y.size(3))};
  p.kernel = {static_cast<int32_t>(q.dims.kh), static_cast<int32_t>(q.dims.kw)};
  p.stride = pair(q.geometry.stride), p.pad = pair(q.geometry.pad), p.dilation = pair(q.geometry.dil);
  p.samples = static_cast<int32_t>(q.samples), p.channels = static_cast<int32_t>(q.part.groups);
  if (q.c_in) p.c_in = indices(scope, *q.c_in, q.x, {q.op, "c_in"});
  if (q.c_out) p.c_out = indices(scope, *q.c_out, q.x, {q.op, "c_out"});
  if (q.table) p.table = indices(scope, *q.table, q.x, {q.op, "width_idx"});
  p.most_row = static_cast<int32_t>(q.most_row);
  p.zero_to = static_cast<int32_t>(q.zero_to);
  p.bias = maybe<const float>(scope, q.bias);
  p.scale = maybe<const float>(scope, q.scale), p.shift = maybe<const float>(scope, q.shift);
  p.table_stride = q.table_stride;
  p.act = static_cast<Act>(q.act);
  p.wide_x = detail::in_chunks(p.x.p, p.xs), p.wide_y = detail::in_chunks<T>(p.y.p, p.ys);
  p.wide_residual = q.residual && detail::in_chunks(p.residual.p, p.rs);
  p.strips = strips_for(p.out.w);
  return p;
}

// False where the kernel's tile does not fit.
template <class T>
bool ran_depthwise(const device::Scope& scope, const Question& q) {
  // Whose filters lie one behind the other: not so where single channels of wider groups run.
  const bool one_a_group = q.dims.out_channels == q.dims.groups;
  if (!is_depthwise(q.part) || !one_a_group || q.count || q.x_rows) return false;
  const DepthwiseProblem<T> p = depthwise_problem<T>(scope, q);
  if (!fits(p)) return false;
  run(p, scope.stream());
  return true;
}

}  // namespace

device::Indices indices(const device::Scope& scope, const Tensor& list, const Tensor& x, Arg arg) {
  device::check_here(list, x, arg);
  EFFKERN_CHECK_TYPE(list.scalar_type() == ScalarType::Int || list.scalar_type() == ScalarType::Long, arg.op, ": ",
                     arg.name, " must be int32 or int64");
  EFFKERN_CHECK_VALUE(list.dim() == 1 && list.size(0) == x.size(0), arg.op, ": ", arg.name, " must have shape [",
                      x.size(0), "], got ", shape_text(list));
  const bool wide = list.scalar_type() == ScalarType::Long;
  return {scope.of<const int32_t>(list), list.stride(0) * (wide ? 2 : 1), wide};
}

bool tf32() {
  static const bool wanted = [] {
    const char* value = std::getenv("EFFKERN_TF32");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return wanted;
}

void run(const device::Scope& scope, const Question& q) {
  device::in_type(q.x.scalar_type(), [&]<class T>(T) {
    if (ran_depthwise<T>(scope, q)) return;
    EFFKERN_CHECK_VALUE(!q.c_in, q.op,
                        ": this kernel, stride or dilation is too large on the GPU where widths differ by sample");
    if constexpr (std::is_same_v<T, float>)
      run(problem<T>(scope, q), tf32() ? Math::TF32 : Math::F32, scope.stream());
    else
      run(problem<T>(scope, q), scope.stream());
  });
}

}  // namespace effkern::conv::gpu
