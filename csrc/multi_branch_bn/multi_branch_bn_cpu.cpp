// multi_branch_bn_add_relu and its gradient on the CPU: tensors in, checks, one call of the loops.
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/tensor.h"
#include "problem.h"

namespace effkern::multi_branch_bn {
namespace {

using Tensors = std::vector<Tensor>;

// The arguments both ops have: branches of one shape and type, a weight and a bias for each.
struct Arguments {
  const char* op;
  ScalarType dtype;
  std::vector<FloatVector> memory;  // keeps what the problem points to

  Arguments(const char* op, const Tensors& xs, const Tensors& weight, const Tensors& bias, Branches& b) : op(op) {
    EFFKERN_CHECK_VALUE(xs.size() >= 1 && xs.size() <= kMaxBranches, op, ": xs must have 1 to ", kMaxBranches,
                        " branches, got ", xs.size());
    b.count = static_cast<int>(xs.size());
    for (int i = 0; i < b.count; ++i) {
      b.x[i] = activation(xs[i], {op, "xs"});
      EFFKERN_CHECK_TYPE(xs[i].scalar_type() == xs[0].scalar_type(), op, ": xs must have one dtype");
      EFFKERN_CHECK_VALUE(same_shape(b.x[i], b.x[0]), op, ": xs must have one shape, got ", shape_text(xs[0]), " and ",
                          shape_text(xs[i]));
    }
    dtype = xs[0].scalar_type();
    // One pixel a channel: contiguous is interleaved.
    b.interleaved = channels_last(xs[0]) || b.x[0].h * b.x[0].w == 1;
    vectors(weight, "weight", b.count, b.x[0].c, b.weight);
    vectors(bias, "bias", b.count, b.x[0].c, b.bias);
  }

  void vectors(const Tensors& given, const char* name, int count, int64_t channels, const float** to) {
    EFFKERN_CHECK_VALUE(given.size() == static_cast<size_t>(count), op, ": ", name, " must have one tensor a branch, ",
                        count, " in all, got ", given.size());
    for (int i = 0; i < count; ++i) {
      memory.emplace_back(given[i], channels, dtype, Arg{op, name});
      to[i] = memory.back().data();
    }
  }

  static bool same_shape(const Activation& a, const Activation& b) {
    return a.n == b.n && a.c == b.c && a.h == b.h && a.w == b.w;
  }
};

Tensor table(int64_t rows, int64_t channels, ScalarType dtype, const Tensor& like) {
  const int64_t size[] = {rows, channels};
  return torch::stable::empty({size, 2}, dtype, std::nullopt, like.device());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> multi_branch_bn_add_relu(Tensors xs, Tensors weight, Tensors bias,
                                                                            Tensors running_mean, Tensors running_var,
                                                                            bool training, double momentum, double eps,
                                                                            bool relu) {
  constexpr const char* op = "multi_branch_bn_add_relu";
  Forward f;
  Arguments arguments(op, xs, weight, bias, f);
  const int64_t channels = f.x[0].c, positions = f.x[0].n * f.x[0].h * f.x[0].w;
  const bool tracked = !running_mean.empty() || !running_var.empty();
  EFFKERN_CHECK_VALUE(training || tracked, op, ": running_mean and running_var must be given unless training");
  if (tracked) {
    arguments.vectors(running_mean, "running_mean", f.count, channels, f.running_mean);
    arguments.vectors(running_var, "running_var", f.count, channels, f.running_var);
  }
  EFFKERN_CHECK_VALUE(!training || positions != 1, op,
                      ": xs must have more than one value per channel when training, got shape ", shape_text(xs[0]));
  EFFKERN_CHECK_VALUE(momentum >= 0 && momentum <= 1, op, ": momentum must lie in [0, 1], got ", momentum);
  EFFKERN_CHECK_VALUE(eps > 0 && std::isfinite(eps), op, ": eps must be positive and finite, got ", eps);

  Tensor y = like_input(xs[0], f.x[0].n, channels, f.x[0].h, f.x[0].w);
  Tensor mean = table(f.count, channels, ScalarType::Double, y),
         invstd = table(f.count, channels, ScalarType::Double, y);
  const int64_t rows = training && tracked ? f.count : 0;
  Tensor new_mean = table(rows, channels, ScalarType::Float, y), new_var = table(rows, channels, ScalarType::Float, y);
  if (channels > 0) {
    f.y = activation(y, {op, "y"});
    f.training = training;
    f.relu = relu;
    f.momentum = momentum;
    f.eps = eps;
    f.mean = static_cast<double*>(mean.mutable_data_ptr());
    f.invstd = static_cast<double*>(invstd.mutable_data_ptr());
    f.new_mean = static_cast<float*>(new_mean.mutable_data_ptr());
    f.new_var = static_cast<float*>(new_var.mutable_data_ptr());
    forward(f);
  }
  return {y, mean, invstd, new_mean, new_var};
}

const double* statistics(const Tensor& tensor, const Branches& b, Arg arg) {
  check_cpu(tensor, arg);
  EFFKERN_CHECK_TYPE(tensor.scalar_type() == ScalarType::Double, arg.op, ": ", arg.name, " must be float64");
  EFFKERN_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == b.count && tensor.size(1) == b.x[0].c, arg.op, ": ",
                      arg.name, " must be [", b.count, ", ", b.x[0].c, "], got ", shape_text(tensor));
  EFFKERN_CHECK_VALUE(tensor.is_contiguous(), arg.op, ": ", arg.name, " must be contiguous");
  return static_cast<const double*>(tensor.const_data_ptr());
}

std::tuple<Tensors, Tensor, Tensor> multi_branch_bn_add_relu_backward(const Tensor& grad, Tensors xs, Tensors weight,
                                                                      Tensors bias, const Tensor& mean,
                                                                      const Tensor& invstd, bool training, bool relu,
                                                                      std::vector<bool> needs) {
  constexpr const char* op = "multi_branch_bn_add_relu_backward";
  Backward g;
  const Arguments arguments(op, xs, weight, bias, g);
  g.grad = activation(grad, {op, "grad"});
  EFFKERN_CHECK_VALUE(Arguments::same_shape(g.grad, g.x[0]), op, ": grad must have the shape of xs ", shape_text(xs[0]),
                      ", got ", shape_text(grad));
  EFFKERN_CHECK_VALUE(needs.size() == xs.size(), op, ": needs must have one entry a branch, got ", needs.size());
  g.mean = statistics(mean, g, {op, "mean"});
  g.invstd = statistics(invstd, g, {op, "invstd"});

  Tensors dx;
  for (int i = 0; i < g.count; ++i) {
    if (needs[i]) {
      dx.push_back(like_input(xs[0], g.x[0].n, g.x[0].c, g.x[0].h, g.x[0].w));
      g.dx[i] = activation(dx.back(), {op, "dx"});
    } else {
      const int64_t none[] = {0};
      dx.push_back(torch::stable::empty({none, 1}, xs[0].scalar_type(), std::nullopt, xs[0].device()));
    }
  }
  const int64_t channels[] = {g.x[0].c};
  Tensor dweight = table(g.count, g.x[0].c, ScalarType::Float, grad);
  Tensor dbias = torch::stable::empty({channels, 1}, ScalarType::Float, std::nullopt, grad.device());
  if (g.x[0].c > 0) {
    g.training = training;
    g.relu = relu;
    g.dweight = static_cast<float*>(dweight.mutable_data_ptr());
    g.dbias = static_cast<float*>(dbias.mutable_data_ptr());
    backward(g);
  }
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace effkern::multi_branch_bn

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("multi_branch_bn_add_relu", TORCH_BOX(&effkern::multi_branch_bn::multi_branch_bn_add_relu));
  m.impl("multi_branch_bn_add_relu_backward", TORCH_BOX(&effkern::multi_branch_bn::multi_branch_bn_add_relu_backward));
}
