// Gradients of skipped blocks on CUDA. The mask becomes a list of rows on the device; what lies between the
// convolutions is calculated again for those samples, each where it lies in a map of the whole batch, and every
// gradient follows the same list: nothing is gathered, and nothing waits for the host. Maps have x's dtype.
#include <string>
#include <vector>

#include "../common/cuda/rows.h"
#include "../conv_backward/backward_gpu.h"
#include "../conv_backward/gradients_cuda.h"
#include "block_cuda.h"
#include "block_grad.h"

namespace effkern::block_skip {
namespace {

using Tensors = std::vector<Tensor>;

// Of one block. Weights and biases: one flag or tensor a convolution.
struct Wanted {
  bool x, keep, res;
  std::vector<bool> weights, biases;

  // Whether anything before the i-th convolution is.
  bool below(size_t i) const {
    bool any = x;
    for (size_t k = 0; k < i; ++k) any = any || weights[k] || biases[k];
    return any;
  }
};
struct Grads {
  MaybeTensor x, keep, res;  // keep: fp32
  std::vector<MaybeTensor> weights, biases;
};

Tensor floats(int64_t size, const Tensor& like) {
  return torch::stable::empty({&size, 1}, ScalarType::Float, std::nullopt, like.device());
}

Tensor as(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

class Block {
 public:
  // Checks all arguments but the mask's values. a outlives this.
  Block(const device::Scope& scope, const Arguments& a, const Tensor& grad)
      : scope_(scope), a_(a), act_(act_from_name(a.act, a.op)), convs_(convs_of(a)), n_(a.x.size(0)) {
    const Tensor& x = a.x;
    check_keep(a.keep, x, {a.op, "keep"});
    EFFKERN_CHECK_VALUE(a.keep.dim() == 1 && a.keep.size(0) == n_, a.op, ": keep must be [", n_, "], got shape ",
                        shape_text(a.keep));
    EFFKERN_CHECK_VALUE(a.stride >= 1 && a.stride < kLimit, a.op, ": stride must be at least 1, got ", a.stride);
    c_out_ = convs_.back().dims.out_channels;
    h_ = conv::out_size(x.size(2), 1, a.stride, 0, 1), w_ = conv::out_size(x.size(3), 1, a.stride, 0, 1);
    check_map(grad, "grad");
    if (a.res) check_map(*a.res, "res");
    EFFKERN_CHECK_VALUE(a.res || (a.stride == 1 && c_out_ == x.size(1)), a.op, ": res must be given for stride ",
                        a.stride, " and ", x.size(1), " to ", c_out_, " channels");
    grad_ = device::as_rows(as(grad, x.scalar_type()), x, {a.op, "grad"});
  }

  void check_map(const Tensor& t, const char* name) const {
    EFFKERN_CHECK_VALUE(t.dim() == 4 && t.size(0) == n_ && t.size(1) == c_out_ && t.size(2) == h_ && t.size(3) == w_,
                        a_.op, ": ", name, " must be [", n_, ", ", c_out_, ", ", h_, ", ", w_, "], got shape ",
                        shape_text(t));
  }

  // y: the block's output, where hard masks see the slopes of relu and relu6.
  Grads backward(const Tensor& y, const Wanted& want) {
    Grads grads;
    grads.weights.resize(convs_.size()), grads.biases.resize(convs_.size());
    for (size_t i = 0; i < convs_.size(); ++i) {
      const Tensor& w = a_.weights[i];
      if (want.weights[i])
        grads.weights[i] =
            device::empty(layout_like(w, w.size(0), w.size(1), w.size(2), w.size(3)), w.scalar_type(), a_.x);
      if (want.biases[i]) grads.biases[i] = floats(convs_[i].dims.out_channels, a_.x);
    }
    if (want.keep) grads.keep = floats(n_, a_.x);
    std::optional<device::Output> gx, g_res;
    if (want.x) gx.emplace(a_.x, a_.x.size(1), a_.x.size(2), a_.x.size(3));
    if (want.res) g_res.emplace(a_.res ? *a_.res : a_.x, c_out_, h_, w_);
    bool empty = grad_.numel() == 0;
    for (const Conv& conv : convs_) empty = empty || conv.dims.out_channels == 0 || conv.dims.in_per_group == 0;
    if (empty) {
      EFFKERN_CHECK_VALUE(grad_.numel() == 0, a_.op, ": weights must have channels");
      for (auto& all : {grads.weights, grads.biases})
        for (MaybeTensor t : all)
          if (t) torch::stable::zero_(*t);
      if (grads.keep) torch::stable::zero_(*grads.keep);
      if (gx) torch::stable::zero_(gx->pixels());
    } else {
      run(y, want, grads, gx ? &gx->pixels() : nullptr, g_res ? &g_res->pixels() : nullptr);
    }
    if (gx) grads.x = gx->finish();
    if (g_res) grads.res = g_res->finish();
    return grads;
  }

 private:
  void run(const Tensor& y, const Wanted& want, Grads& grads, Tensor* gx, Tensor* g_res) {
    const size_t last = convs_.size() - 1;
    const bool curved = act_ == conv::Act::Hardswish || act_ == conv::Act::Silu, soft = is_soft(a_.keep);
    const bool again = want.keep || soft || curved, inner = want.below(convs_.size());
    mask_ = as(a_.keep, ScalarType::Float);
    rows_ = device::empty_ints(n_, a_.x), count_ = device::empty_ints(1, a_.x);
    sort(scope_, a_.keep, rows_, count_, /*rest=*/true);
    const conv::gpu::Listed kept{.rows = rows_, .count = count_};
    const Tensor x = dense(device::pixels(a_.x, a_.x, {a_.op, "x"}));
    const Tensor shortcut = a_.res ? dense(device::pixels(*a_.res, a_.x, {a_.op, "res"})) : x;

    Tensors inputs{x}, before;  // of each convolution; the activation's of each but the last
    for (size_t i = 0; (inner || again) && i < last; ++i) {
      const Geometry& g = convs_[i].geometry;
      const int64_t k = convs_[i].dims.kh;
      const int64_t h = conv::out_size(inputs[i].size(2), k, g.stride[0], g.pad[0], 1),
                    w = conv::out_size(inputs[i].size(3), k, g.stride[1], g.pad[1], 1);
      const Tensor out = map(convs_[i].dims.out_channels, h, w);
      convolve(i, inputs[i], out, act_, {}, want.keep);
      inputs.push_back(out);
      before.push_back(out);  // clipped activations show their slopes
      if (!curved) continue;
      before[i] = map(convs_[i].dims.out_channels, h, w);
      convolve(i, inputs[i], before[i], conv::Act::None, {}, false);
    }
    MaybeTensor z;
    if (again) {
      z = map(c_out_, h_, w_);
      convolve(last, inputs[last], *z, conv::Act::None, shortcut, want.keep);
    } else if (act_ != conv::Act::None) {
      check_map(y, "y");
      z = device::as_rows(as(y, a_.x.scalar_type()), a_.x, {a_.op, "y"});
    }

    Tensor gz = inner ? map(c_out_, h_, w_) : grad_;
    MaybeTensor rest;
    if (g_res != nullptr)
      rest = *g_res;
    else if (want.x && !a_.res)
      rest = map(c_out_, h_, w_);
    at_sum({.gy = grad_,
            .z = z,
            .old = want.keep ? MaybeTensor(shortcut) : MaybeTensor(),
            .gz = inner ? &gz : nullptr,
            .rest = rest,
            .bias = grads.biases[last],
            .dots = grads.keep,
            .soft = soft});
    for (size_t i = last;; --i) {
      const Conv& conv = convs_[i];
      if (!inner) break;
      conv::gpu::Convolution c{};
      c.op = a_.op, c.gz = gz, c.x = inputs[i], c.weight = conv.weight, c.dims = conv.dims, c.geometry = conv.geometry;
      c.part = {1, conv.dims.out_channels, conv.dims.in_per_group};
      if (grads.weights[i]) conv::gpu::weight_gradient(scope_, c, *grads.weights[i], kept);
      if (!want.below(i)) break;
      if (i == 0) {
        if (a_.res) torch::stable::zero_(*gx);  // of dropped samples
        conv::gpu::input_gradient(scope_, c, *gx, kept, a_.res ? MaybeTensor() : rest, a_.res ? 0 : n_);
        break;
      }
      const Tensor& out = inputs[i];
      Tensor g = map(out.size(1), out.size(2), out.size(3));
      conv::gpu::input_gradient(scope_, c, g, kept);
      gz = map(out.size(1), out.size(2), out.size(3));
      at_sum({.gy = g, .z = before[i - 1], .gz = &gz, .bias = grads.biases[i - 1]});
    }
  }

  // Uninitialised, channels side by side.
  Tensor map(int64_t c, int64_t h, int64_t w) const {
    return device::empty({{n_, c, h, w}, {h * w * c, 1, w * c, c}}, a_.x.scalar_type(), a_.x);
  }

  void convolve(size_t i, const Tensor& x, const Tensor& y, conv::Act act, const MaybeTensor& residual, bool all) {
    const Conv& conv = convs_[i];
    conv::gpu::Question q{.op = a_.op,
                          .x = x,
                          .weight = conv.weight,
                          .y = y,
                          .dims = conv.dims,
                          .part = {1, conv.dims.out_channels, conv.dims.in_per_group},
                          .geometry = conv.geometry,
                          .act = act,
                          .residual = residual,
                          .bias = conv.bias,
                          .samples = n_};
    if (!all) q.count = count_, q.x_rows = q.y_rows = rows_;
    if (!all && residual) q.residual_rows = rows_;
    conv::gpu::run(scope_, q);
  }

  struct Sum {
    Tensor gy;
    MaybeTensor z = {}, old = {};
    Tensor* gz = nullptr;
    MaybeTensor rest = {}, bias = {}, dots = {};
    bool soft = false;
  };
  void at_sum(const Sum& s) {
    device::in_type(a_.x.scalar_type(), [&]<class T>(T) {
      const auto rows = [&](const MaybeTensor& t) {
        return t ? device::rows<const T>(scope_, *t) : device::Rows<const T>{};
      };
      BlockGrad<T> p{};
      p.gy = device::rows<const T>(scope_, s.gy), p.z = rows(s.z), p.old = rows(s.old);
      if (s.gz != nullptr) p.gz = device::rows<T>(scope_, *s.gz);
      if (s.rest) p.rest = device::rows<T>(scope_, *s.rest);
      p.keep = scope_.of<const float>(mask_), p.keep_step = mask_.stride(0), p.soft = s.soft;
      p.samples = static_cast<int32_t>(n_), p.channels = static_cast<int32_t>(s.gy.size(1));
      p.pixels = static_cast<int32_t>(s.gy.size(2) * s.gy.size(3));
      p.act = static_cast<conv::gpu::Act>(act_);
      p.wide =
          device::wide(p.gy) && device::wide(p.z) && device::wide(p.old) && device::wide(p.gz) && device::wide(p.rest);
      p.template cut<T>();
      const int64_t pieces = int64_t{p.samples} * p.pieces, groups = device::column_groups<T>(p.channels);
      Tensor sums, dots;
      if (s.bias) sums = floats(pieces * p.channels, a_.x), p.sums = scope_.of<float>(sums);
      if (s.dots) dots = floats(pieces * groups, a_.x), p.dots = scope_.of<float>(dots);
      block_skip::run(p, scope_.stream());
      using conv::gpu::FoldSums;
      if (s.bias)
        conv::gpu::run(FoldSums{p.sums, scope_.of<float>(*s.bias), static_cast<int32_t>(pieces), p.channels},
                       scope_.stream());
      if (s.dots)
        conv::gpu::run(FoldSums{p.dots, scope_.of<float>(*s.dots), static_cast<int32_t>(p.pieces * groups), p.samples},
                       scope_.stream());
    });
  }

  const device::Scope& scope_;
  const Arguments& a_;
  const conv::Act act_;
  const std::vector<Conv> convs_;
  const int64_t n_;
  int64_t c_out_, h_, w_;
  Tensor grad_, mask_, rows_, count_;
};

// What a backward op returns for a gradient that may not be wanted.
Tensor or_nothing(const MaybeTensor& t, ScalarType type, const Tensor& x) {
  const int64_t none = 0;
  return t ? as(*t, type) : torch::stable::empty({&none, 1}, x.scalar_type(), std::nullopt, x.device());
}

Tensors skip_block_backward(const Tensor& grad, const Tensor& x, const Tensor& keep, Tensors weights, Tensors biases,
                            int64_t stride, const MaybeTensor& res, const Tensor& y, Text act,
                            std::vector<bool> needs) {
  constexpr const char* op = "skip_block_backward";
  const device::Scope scope(x, {op, "x"});
  device::pixels(x, x, {op, "x"});
  const size_t convs = weights.size();
  EFFKERN_CHECK_VALUE((convs == 2 || convs == 3) && biases.size() == convs, op,
                      ": weights and biases must be 2 or 3, got ", convs, " and ", biases.size());
  EFFKERN_CHECK_VALUE(needs.size() == 2 * convs + 3, op, ": needs must have ", 2 * convs + 3, " values, got ",
                      needs.size());
  Wanted want{needs[0], needs[1], needs.back() && res.has_value(), {}, {}};
  for (size_t i = 0; i < convs; ++i) want.weights.push_back(needs[2 + 2 * i]), want.biases.push_back(needs[3 + 2 * i]);
  const Arguments a{op, x, keep, weights, biases, stride, res, act, "auto"};
  const Grads grads = Block(scope, a, grad).backward(y, want);
  Tensors all{or_nothing(grads.x, x.scalar_type(), x), or_nothing(grads.keep, keep.scalar_type(), x)};
  for (size_t i = 0; i < convs; ++i) {
    all.push_back(or_nothing(grads.weights[i], weights[i].scalar_type(), x));
    all.push_back(or_nothing(grads.biases[i], biases[i].scalar_type(), x));
  }
  all.push_back(or_nothing(grads.res, x.scalar_type(), x));
  return all;
}

// Block after block, from what each one was given, which is calculated again.
Tensors skip_stage_backward(const Tensor& grad, const Tensor& x, const Tensor& keep, Tensors weights, Tensors biases,
                            Text kind, Text act, std::vector<bool> needs) {
  constexpr const char* op = "skip_stage_backward";
  const device::Scope scope(x, {op, "x"});
  device::pixels(x, x, {op, "x"});
  EFFKERN_CHECK_VALUE(kind == "basic" || kind == "bottleneck", op, ": kind must be basic or bottleneck, got '", kind,
                      "'");
  check_keep(keep, x, {op, "keep"});
  EFFKERN_CHECK_VALUE(keep.dim() == 2 && keep.size(0) == x.size(0), op, ": keep must be [", x.size(0),
                      ", B], got shape ", shape_text(keep));
  const size_t convs = kind == "basic" ? 2 : 3, blocks = static_cast<size_t>(keep.size(1)), count = convs * blocks;
  EFFKERN_CHECK_VALUE(weights.size() == count && biases.size() == count, op, ": weights and biases must have ", count,
                      " tensors for ", blocks, " ", kind, " blocks, got ", weights.size(), " and ", biases.size());
  EFFKERN_CHECK_VALUE(needs.size() == 2 + 2 * count, op, ": needs must have ", 2 + 2 * count, " values, got ",
                      needs.size());
  const MaybeTensor none;
  std::vector<Tensor> states{x}, keeps;  // what each block is given
  const auto arguments = [&](size_t b, const Tensor& state) {
    return Arguments{op,
                     state,
                     keeps[b],
                     {&weights[b * convs], &weights[b * convs] + convs},
                     {&biases[b * convs], &biases[b * convs] + convs},
                     1,
                     none,
                     act,
                     "auto"};
  };
  const auto wanted = [&](size_t b) {
    Wanted want{b > 0 || needs[0], needs[1], false, {}, {}};
    for (size_t i = b * convs; i < (b + 1) * convs; ++i)
      want.weights.push_back(needs[2 + i]), want.biases.push_back(needs[2 + count + i]);
    return want;
  };
  for (size_t b = 0; b < blocks; ++b) keeps.push_back(torch::stable::select(keep, 1, static_cast<int64_t>(b)));
  for (size_t b = 0; b < blocks; ++b) states.push_back(skip_block(arguments(b, states[b])));

  Tensors all(2 + 2 * count);
  MaybeTensor g = grad;
  if (blocks == 0) {
    device::Output copy(x, x.size(1), x.size(2), x.size(3));
    torch::stable::copy_(copy.pixels(), grad);
    g = copy.finish();
  }
  const int64_t shape[] = {x.size(0), keep.size(1)};
  Tensor g_keep = torch::stable::empty({shape, 2}, keep.scalar_type(), std::nullopt, x.device());
  for (size_t b = blocks; b-- > 0;) {
    const Arguments a = arguments(b, states[b]);
    Grads grads = Block(scope, a, *g).backward(states[b + 1], wanted(b));
    if (grads.x) g = grads.x;
    if (grads.keep) {
      Tensor column = torch::stable::select(g_keep, 1, static_cast<int64_t>(b));
      torch::stable::copy_(column, *grads.keep);
    }
    for (size_t i = 0; i < convs; ++i) {
      const size_t at = b * convs + i;
      all[2 + at] = or_nothing(grads.weights[i], weights[at].scalar_type(), x);
      all[2 + count + at] = or_nothing(grads.biases[i], biases[at].scalar_type(), x);
    }
  }
  all[0] = or_nothing(needs[0] ? g : none, x.scalar_type(), x);
  all[1] = or_nothing(needs[1] ? MaybeTensor(g_keep) : none, keep.scalar_type(), x);
  return all;
}

}  // namespace
}  // namespace effkern::block_skip

EFFKERN_CUDA_OPS(m) {
  m.impl("skip_block_backward", TORCH_BOX(&effkern::block_skip::skip_block_backward));
  m.impl("skip_stage_backward", TORCH_BOX(&effkern::block_skip::skip_stage_backward));
}
