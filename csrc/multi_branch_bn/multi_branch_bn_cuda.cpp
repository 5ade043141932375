// multi_branch_bn_add_relu and its gradient on CUDA: two passes over the maps each, with a small kernel between them
// that adds up slices. Statistics stay on the device.
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/cuda/rows.h"
#include "bn_gpu.h"

namespace effkern::multi_branch_bn::gpu {
namespace {

using Tensors = std::vector<Tensor>;

Tensor empty_table(int64_t rows, int64_t channels, ScalarType type, const Tensor& like) {
  const int64_t size[] = {rows, channels};
  return torch::stable::empty({size, 2}, type, std::nullopt, like.device());
}
Tensor empty_vector(int64_t size, ScalarType type, const Tensor& like) {
  return torch::stable::empty({&size, 1}, type, std::nullopt, like.device());
}

// The arguments both ops have, checked: branches as rows, vectors as fp32, which this keeps.
struct Arguments {
  const char* op;
  const Tensor& x;
  Tensors maps, vectors;
  int32_t count = 0;
  int64_t channels = 0, pixels = 0;

  Arguments(const char* op, const Tensors& xs) : op(op), x(first(op, xs)) {
    count = static_cast<int32_t>(xs.size());
    for (const Tensor& t : xs) {
      EFFKERN_CHECK_TYPE(t.scalar_type() == x.scalar_type(), op, ": xs must have one dtype");
      EFFKERN_CHECK_VALUE(same_shape(t), op, ": xs must have one shape, got ", shape_text(x), " and ", shape_text(t));
      maps.push_back(device::as_rows(t, x, {op, "xs"}));
    }
    channels = x.size(1), pixels = x.size(0) * x.size(2) * x.size(3);
    EFFKERN_CHECK_VALUE(pixels <= device::kMostRows, op, ": xs must have at most ", device::kMostRows, " pixels, got ",
                        pixels);
  }

  static const Tensor& first(const char* op, const Tensors& xs) {
    EFFKERN_CHECK_VALUE(!xs.empty() && xs.size() <= kBranches, op, ": xs must have 1 to ", kBranches, " branches, got ",
                        xs.size());
    EFFKERN_CHECK_VALUE(xs[0].dim() == 4, op, ": xs must be 4-d [N, C, H, W], got shape ", shape_text(xs[0]));
    return xs[0];
  }

  bool same_shape(const Tensor& t) const {
    if (t.dim() != 4) return false;
    for (int i = 0; i < 4; ++i)
      if (t.size(i) != x.size(i)) return false;
    return true;
  }

  Vectors take(const device::Scope& scope, const Tensors& given, const char* name) {
    EFFKERN_CHECK_VALUE(given.size() == static_cast<size_t>(count), op, ": ", name, " must have one tensor a branch, ",
                        count, " in all, got ", given.size());
    Vectors found{};
    for (int i = 0; i < count; ++i) {
      const auto at = static_cast<size_t>(i);
      vectors.push_back(*device::vector(given[at], channels, /*exact=*/true, x.scalar_type(), x, {op, name}));
      found.of[i] = scope.of<const float>(vectors.back());
    }
    return found;
  }

  template <class T>
  Maps<T> branches(const device::Scope& scope) const {
    Maps<T> found{};
    found.count = count, found.channels = static_cast<int32_t>(channels);
    found.slices = device::column_slices<T>(pixels, channels);
    found.wide = true;
    for (int i = 0; i < count; ++i) {
      found.x[i] = device::rows<const T>(scope, maps[static_cast<size_t>(i)]);
      found.wide = found.wide && device::wide(found.x[i]);
    }
    return found;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensors xs, Tensors weight, Tensors bias,
                                                           Tensors running_mean, Tensors running_var, bool training,
                                                           double momentum, double eps, bool relu) {
  constexpr const char* op = "multi_branch_bn_add_relu";
  const device::Scope scope(Arguments::first(op, xs), {op, "xs"});
  Arguments a(op, xs);
  Finish f{};
  f.count = a.count, f.channels = static_cast<int32_t>(a.channels), f.momentum = momentum, f.eps = eps;
  f.weight = a.take(scope, weight, "weight"), f.bias = a.take(scope, bias, "bias");
  const bool tracked = !running_mean.empty() || !running_var.empty();
  EFFKERN_CHECK_VALUE(training || tracked, op, ": running_mean and running_var must be given unless training");
  if (tracked) {
    f.running_mean = a.take(scope, running_mean, "running_mean");
    f.running_var = a.take(scope, running_var, "running_var");
  }
  EFFKERN_CHECK_VALUE(!training || a.pixels != 1, op,
                      ": xs must have more than one value per channel when training, got shape ", shape_text(a.x));
  EFFKERN_CHECK_VALUE(momentum >= 0 && momentum <= 1, op, ": momentum must lie in [0, 1], got ", momentum);
  EFFKERN_CHECK_VALUE(eps > 0 && std::isfinite(eps), op, ": eps must be positive and finite, got ", eps);

  device::Output y(a.x, a.channels, a.x.size(2), a.x.size(3));
  const Tensor mean = empty_table(a.count, a.channels, ScalarType::Double, a.x),
               invstd = empty_table(a.count, a.channels, ScalarType::Double, a.x);
  const int64_t rows = training && tracked ? a.count : 0;
  const Tensor new_mean = empty_table(rows, a.channels, ScalarType::Float, a.x),
               new_var = empty_table(rows, a.channels, ScalarType::Float, a.x);
  if (a.channels == 0) return {y.finish(), mean, invstd, new_mean, new_var};
  const Tensor scale = empty_table(a.count, a.channels, ScalarType::Float, a.x),
               shift = empty_vector(a.channels, ScalarType::Float, a.x);
  f.mean = scope.of<double>(mean), f.invstd = scope.of<double>(invstd);
  if (rows > 0) f.new_mean = scope.of<float>(new_mean), f.new_var = scope.of<float>(new_var);
  f.scale = scope.of<float>(scale), f.shift = scope.of<float>(shift);
  device::in_type(a.x.scalar_type(), [&]<class T>(T) {
    Apply<T> apply{};
    apply.maps = a.branches<T>(scope);
    f.slices = apply.maps.slices;
    Tensor parts;
    if (training) {
      parts = empty_vector(2 * int64_t{a.count} * std::max(f.slices.count, 1) * a.channels, ScalarType::Float, a.x);
      f.parts = scope.of<const float>(parts);
      if (a.pixels > 0) run(Statistics<T>{apply.maps, scope.of<float>(parts)}, scope.stream());
    }
    run(f, scope.stream());
    apply.scale = f.scale, apply.shift = f.shift, apply.relu = relu;
    apply.y = device::rows<T>(scope, y.pixels());
    apply.maps.wide = apply.maps.wide && device::wide(apply.y);
    if (a.pixels > 0) run(apply, scope.stream());
  });
  return {y.finish(), mean, invstd, new_mean, new_var};
}

Tensor statistics(const Arguments& a, const Tensor& t, const char* name) {
  device::check_here(t, a.x, {a.op, name});
  EFFKERN_CHECK_TYPE(t.scalar_type() == ScalarType::Double, a.op, ": ", name, " must be float64");
  EFFKERN_CHECK_VALUE(t.dim() == 2 && t.size(0) == a.count && t.size(1) == a.channels, a.op, ": ", name, " must be [",
                      a.count, ", ", a.channels, "], got ", shape_text(t));
  return torch::stable::contiguous(t);
}

std::tuple<Tensors, Tensor, Tensor> backward(const Tensor& grad, Tensors xs, Tensors weight, Tensors bias,
                                             const Tensor& mean, const Tensor& invstd, bool training, bool relu,
                                             std::vector<bool> needs) {
  constexpr const char* op = "multi_branch_bn_add_relu_backward";
  const device::Scope scope(Arguments::first(op, xs), {op, "xs"});
  Arguments a(op, xs);
  EFFKERN_CHECK_VALUE(a.same_shape(grad), op, ": grad must have the shape of xs ", shape_text(a.x), ", got ",
                      shape_text(grad));
  EFFKERN_CHECK_VALUE(needs.size() == xs.size(), op, ": needs must have one entry a branch, got ", needs.size());
  Tensor incoming = device::as_rows(grad, a.x, {op, "grad"});
  if (incoming.scalar_type() != a.x.scalar_type()) incoming = torch::stable::to(incoming, a.x.scalar_type());
  const Tensor means = statistics(a, mean, "mean"), invstds = statistics(a, invstd, "invstd");
  const Vectors weights = a.take(scope, weight, "weight"), biases = a.take(scope, bias, "bias");

  std::vector<std::optional<device::Output>> made(xs.size());
  bool any = false;
  for (size_t i = 0; i < xs.size(); ++i)
    if (needs[i]) any = true, made[i].emplace(a.x, a.channels, a.x.size(2), a.x.size(3));
  const Tensor dweight = empty_table(a.count, a.channels, ScalarType::Float, a.x),
               dbias = empty_vector(a.channels, ScalarType::Float, a.x),
               slope = empty_table(a.count, a.channels, ScalarType::Float, a.x),
               offset = empty_table(a.count, a.channels, ScalarType::Float, a.x);
  if (a.channels > 0)
    device::in_type(a.x.scalar_type(), [&]<class T>(T) {
      Gradient<T> of{};
      of.maps = a.branches<T>(scope);
      of.grad = device::rows<const T>(scope, incoming);
      of.mean = scope.of<const double>(means), of.invstd = scope.of<const double>(invstds);
      of.weight = weights, of.bias = biases, of.relu = relu;
      of.maps.wide = of.maps.wide && device::wide(of.grad);
      const device::Slices slices = of.maps.slices;
      const Tensor parts =
          empty_vector((1 + int64_t{a.count}) * std::max(slices.count, 1) * a.channels, ScalarType::Float, a.x);
      if (a.pixels > 0) run(GradientSums<T>{of, scope.of<float>(parts)}, scope.stream());
      run(GradientFinish{scope.of<const float>(parts), slices, a.count, static_cast<int32_t>(a.channels), weights,
                         of.mean, of.invstd, scope.of<float>(dweight), scope.of<float>(dbias), scope.of<float>(slope),
                         scope.of<float>(offset)},
          scope.stream());
      GradientApply<T> apply{};
      apply.slope = scope.of<const float>(slope), apply.offset = scope.of<const float>(offset);
      apply.training = training;
      for (size_t i = 0; i < made.size(); ++i) {
        if (!made[i]) continue;
        apply.dx[i] = device::rows<T>(scope, made[i]->pixels());
        of.maps.wide = of.maps.wide && device::wide(apply.dx[i]);
      }
      apply.of = of;
      if (any && a.pixels > 0) run(apply, scope.stream());
    });
  Tensors dxs;
  for (auto& dx : made) dxs.push_back(dx ? dx->finish() : empty_vector(0, a.x.scalar_type(), a.x));
  return {dxs, dweight, dbias};
}

}  // namespace
}  // namespace effkern::multi_branch_bn::gpu

EFFKERN_CUDA_OPS(m) {
  m.impl("multi_branch_bn_add_relu", TORCH_BOX(&effkern::multi_branch_bn::gpu::forward));
  m.impl("multi_branch_bn_add_relu_backward", TORCH_BOX(&effkern::multi_branch_bn::gpu::backward));
}
