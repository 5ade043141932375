// Gradients of the ragged convolution on CUDA. The samples are sorted by width on the device as in the forward pass,
// and once more with inputs and outputs exchanged: then the gradient in the input is one convolution over the classes,
// and that in the weight one launch whose tiles take the samples that reach them. Widths never come to the host.
#include <tuple>
#include <vector>

#include "../common/cuda/rows.h"
#include "../conv_backward/backward_gpu.h"
#include "../conv_backward/gradients_cuda.h"
#include "ragged_grad.h"
#include "schedule.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

constexpr const char* kOp = "sliced_conv2d_ragged_backward";
enum Input { kX, kWeight, kBias, kScale, kShift };

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using conv::gpu::Listed;

Tensor empty(std::vector<int64_t> sizes, ScalarType type, const Tensor& like) {
  return torch::stable::empty({sizes.data(), sizes.size()}, type, std::nullopt, like.device());
}

Tensor as(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

// Sorts the samples by (c_out, c_in), the widest first.
Listed sorted(const device::Scope& scope, const Tensor& x, const device::Indices& c_in, int64_t most_in,
              const device::Indices& c_out, int64_t most_out) {
  const int64_t n = x.size(0);
  Listed all{
      .rows = device::empty_ints(n, x), .parts = device::empty_ints(4 * n, x), .part_count = device::empty_ints(1, x)};
  Schedule s{};
  s.c_in = c_in, s.c_out = c_out;
  s.samples = static_cast<int32_t>(n);
  s.most_in = static_cast<int32_t>(most_in), s.most_out = static_cast<int32_t>(most_out);
  s.order = scope.of<int32_t>(*all.rows);
  s.parts = scope.of<int32_t>(*all.parts).as<Part>();
  s.part_count = scope.of<int32_t>(*all.part_count);
  run(s, scope.stream());
  return all;
}

// The row of each sample, held to those there are.
Tensor held_rows(const device::Scope& scope, const Tensor& x, const device::Indices& rows, int64_t count) {
  const int64_t n = x.size(0);
  const Tensor order = device::empty_ints(n, x), parts = device::empty_ints(4 * n, x),
               number = device::empty_ints(1, x);
  const Tensor to = device::empty_ints(n, x);
  Schedule s{};  // one class of all
  s.table = rows, s.most_row = static_cast<int32_t>(count - 1);
  s.samples = static_cast<int32_t>(n);
  s.order = scope.of<int32_t>(order), s.parts = scope.of<int32_t>(parts).as<Part>();
  s.part_count = scope.of<int32_t>(number), s.table_row = scope.of<int32_t>(to);
  run(s, scope.stream());
  return to;
}

class Backward {
 public:
  Backward(const device::Scope& scope, const Tensor& grad, const Tensor& y, const Tensor& x, const Tensor& weight,
           const MaybeTensor& bias, const Tensor& c_in, const Tensor& c_out, const Geometry& geometry, int64_t groups,
           const MaybeTensor& scale_table, const MaybeTensor& shift_table, const MaybeTensor& width_idx, conv::Act act)
      : scope_(scope), act_(act) {
    const ScalarType dtype = x.scalar_type();
    conv_.op = kOp;
    conv_.x = device::pixels(x, x, {kOp, "x"});
    device::check_here(weight, x, {kOp, "weight"});
    conv_.weight = weight;
    conv_.dims = weight_dims(weight, groups, {kOp, "weight"}, &dtype);
    conv_.geometry = geometry;
    conv_.c_in = c_in, conv_.c_out = c_out;
    const PackedWeight::Dims& dims = conv_.dims;
    int64_t map[2];
    output_map(x, dims.kh, dims.kw, geometry, kOp, map);
    for (const Tensor* t : {&grad, &y})
      EFFKERN_CHECK_VALUE(t->dim() == 4 && t->size(0) == x.size(0) && t->size(1) <= dims.out_channels &&
                              t->size(1) == grad.size(1) && t->size(2) == map[0] && t->size(3) == map[1],
                          kOp, ": grad and y must have shape [", x.size(0), ", at most ", dims.out_channels, ", ",
                          map[0], ", ", map[1], "], got ", shape_text(*t));
    most_out_ = grad.size(1), most_in_ = std::min(x.size(1), dims.in_per_group * dims.groups);
    depthwise_ = conv::gpu::is_depthwise({dims.groups, dims.out_channels / dims.groups, dims.in_per_group});
    EFFKERN_CHECK_VALUE(groups == 1 || depthwise_, kOp,
                        ": groups must be 1 on the GPU where widths differ by sample, or as many as channels, got ",
                        groups);
    conv_.part = depthwise_ ? RunningPart{std::min(most_out_, most_in_), 1, 1} : RunningPart{1, most_out_, most_in_};
    in_ = conv::gpu::indices(scope, c_in, x, {kOp, "c_in"}), out_ = conv::gpu::indices(scope, c_out, x, {kOp, "c_out"});
    bias_ = device::vector(bias, dims.out_channels, true, dtype, x, {kOp, "bias"});
    scale_ = device::table(scale_table, most_out_, dtype, x, {kOp, "scale_table"});
    shift_ = device::table(shift_table, most_out_, dtype, x, {kOp, "shift_table"});
    EFFKERN_CHECK_VALUE((scale_ || shift_) == width_idx.has_value(), kOp,
                        ": width_idx must be given with, and only with, tables");
    EFFKERN_CHECK_VALUE(!scale_ || !shift_ || scale_->size(0) == shift_->size(0), kOp,
                        ": scale_table and shift_table must have as many rows");
    table_rows_ = scale_ ? scale_->size(0) : shift_ ? shift_->size(0) : 0;
    EFFKERN_CHECK_VALUE(!width_idx || table_rows_ > 0 || x.size(0) == 0, kOp,
                        ": the tables must have at least one row");
    gy_ = device::as_rows(as(grad, dtype), x, {kOp, "grad"});
    const bool clips = act == conv::Act::Relu || act == conv::Act::Relu6;
    if (clips) y_ = device::as_rows(as(y, dtype), x, {kOp, "y"});
    if (gy_.numel() == 0) return;
    if (width_idx)
      table_row_ = held_rows(scope, x, conv::gpu::indices(scope, *width_idx, x, {kOp, "width_idx"}), table_rows_);
    if (!depthwise_) forward_ = sorted(scope, x, in_, most_in_, out_, most_out_);
  }

  bool empty_batch() const { return gy_.numel() == 0; }

  // Leaves what the convolution's gradients read, and fills the sums that are given (fp32, rows of tables as given).
  void epilogue(const MaybeTensor& by_bias, const MaybeTensor& by_scale, const MaybeTensor& by_shift) {
    const bool clips = act_ == conv::Act::Relu || act_ == conv::Act::Relu6, curved = !clips && act_ != conv::Act::None;
    const bool changes = act_ != conv::Act::None || scale_;
    conv_.gz = changes ? map() : gy_;
    if (!changes && !by_bias && !by_shift) return;
    const MaybeTensor z = curved || by_scale ? MaybeTensor(sums_again()) : MaybeTensor();
    device::in_type(gy_.scalar_type(), [&]<class T>(T) {
      const auto rows = [&](const MaybeTensor& t) {
        return t ? device::rows<const T>(scope_, *t) : device::Rows<const T>{};
      };
      RaggedGrad<T> p{};
      p.gy = rows(gy_), p.y = rows(y_), p.z = rows(z);
      if (changes) p.gz = device::rows<T>(scope_, conv_.gz);
      p.c_out = out_;
      if (scale_) p.scale = scope_.of<const float>(*scale_);
      if (shift_) p.shift = scope_.of<const float>(*shift_);
      if (table_row_) p.table_row = scope_.of<const int32_t>(*table_row_);
      p.table_stride = most_out_;
      p.samples = static_cast<int32_t>(gy_.size(0)), p.channels = static_cast<int32_t>(most_out_);
      p.pixels = static_cast<int32_t>(gy_.size(2) * gy_.size(3));
      p.act = static_cast<conv::gpu::Act>(act_);
      p.wide = device::wide(p.gy) && device::wide(p.y) && device::wide(p.z) && device::wide(p.gz);
      p.template cut<T>();
      const int64_t pieces = int64_t{p.samples} * p.pieces;
      Tensor parts[3];
      const auto part = [&](int i, const MaybeTensor& wanted, Global<float>& to) {
        if (wanted) parts[i] = empty({pieces, most_out_}, ScalarType::Float, gy_), to = scope_.of<float>(parts[i]);
      };
      part(0, by_bias, p.by_bias), part(1, by_scale, p.by_scale), part(2, by_shift, p.by_shift);
      run(p, scope_.stream());
      if (by_bias)
        conv::gpu::run(
            conv::gpu::FoldSums{p.by_bias, scope_.of<float>(*by_bias), static_cast<int32_t>(pieces), p.channels},
            scope_.stream());
      const auto fold = [&](const MaybeTensor& to, Global<const float> sums) {
        if (to)
          run(FoldTable{sums, p.table_row, scope_.of<float>(*to), p.samples, p.pieces, p.channels,
                        static_cast<int32_t>(to->size(0)), static_cast<int32_t>(to->size(1))},
              scope_.stream());
      };
      fold(by_scale, p.by_scale), fold(by_shift, p.by_shift);
    });
  }

  void by_input(Tensor& gx) const {
    conv::gpu::input_gradient(scope_, conv_, gx,
                              depthwise_ ? Listed{} : sorted(scope_, conv_.x, out_, most_out_, in_, most_in_));
  }
  void by_weight(Tensor& gw) const { conv::gpu::weight_gradient(scope_, conv_, gw, forward_); }
  bool has_weights() const { return most_in_ > 0; }

 private:
  // Uninitialised, like gy, channels side by side.
  Tensor map() const {
    const int64_t n = gy_.size(0), h = gy_.size(2), w = gy_.size(3), c = most_out_;
    return device::empty({{n, c, h, w}, {h * w * c, 1, w * c, c}}, gy_.scalar_type(), gy_);
  }

  // What the epilogue was given, with the bias.
  Tensor sums_again() const {
    const Tensor z = map();
    conv::gpu::Question q{.op = kOp,
                          .x = conv_.x,
                          .weight = depthwise_ ? conv_.weight : device::taps(conv_.weight),
                          .y = z,
                          .dims = conv_.dims,
                          .part = conv_.part,
                          .geometry = conv_.geometry,
                          .bias = bias_,
                          .samples = z.size(0)};
    if (depthwise_)
      q.c_in = conv_.c_in, q.c_out = conv_.c_out;
    else
      q.x_rows = q.y_rows = forward_.rows, q.parts = forward_.parts, q.part_count = forward_.part_count;
    conv::gpu::run(scope_, q);
    return z;
  }

  const device::Scope& scope_;
  const conv::Act act_;
  conv::gpu::Convolution conv_{};
  int64_t most_in_, most_out_, table_rows_;
  bool depthwise_;
  device::Indices in_, out_;
  MaybeTensor bias_, scale_, shift_, table_row_, y_;
  Tensor gy_;
  Listed forward_;
};

Grads ragged_backward(const Tensor& grad, const Tensor& y, const Tensor& x, const Tensor& weight,
                      const MaybeTensor& bias, const Tensor& c_in, const Tensor& c_out, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, Text group_mode,
                      const MaybeTensor& scale_table, const MaybeTensor& shift_table, const MaybeTensor& width_idx,
                      Text act, Text algo, std::vector<bool> needs) {
  const device::Scope scope(x, {kOp, "x"});
  check_algo(algo, kOp);
  check_group_mode(group_mode, kOp);
  EFFKERN_CHECK_VALUE(groups == 1 || group_mode == "prefix_groups", kOp,
                      ": groups must be 1 on the GPU where widths differ by sample, or as many as channels, got ",
                      groups);
  EFFKERN_CHECK_VALUE(needs.size() == 5, kOp, ": needs must have 5 values, got ", needs.size());
  Backward backward(scope, grad, y, x, weight, bias, c_in, c_out, geometry(stride, padding, dilation, kOp), groups,
                    scale_table, shift_table, width_idx, act_from_name(act, kOp));
  // Sums in fp32, of the argument's shape; nothing where it is not wanted.
  const auto sums = [&](const MaybeTensor& t, Input input) -> MaybeTensor {
    if (!t || !needs[input] || t->numel() == 0) return {};
    Tensor to = empty(std::vector<int64_t>(t->sizes().begin(), t->sizes().end()), ScalarType::Float, x);
    if (input == kBias || backward.empty_batch()) torch::stable::zero_(to);
    return to;
  };
  const MaybeTensor gb = sums(bias, kBias), gscale = sums(scale_table, kScale), gshift = sums(shift_table, kShift);
  std::optional<device::Output> gx;
  if (needs[kX]) gx.emplace(x, x.size(1), x.size(2), x.size(3));
  Tensor gw = empty({0}, weight.scalar_type(), x);
  if (needs[kWeight])
    gw = empty({weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, weight.scalar_type(), x);
  if (!backward.empty_batch()) {
    backward.epilogue(gb, gscale, gshift);
    if (gx && x.numel() > 0) backward.by_input(gx->pixels());
    if (gw.numel() > 0 && backward.has_weights()) backward.by_weight(gw);
  } else if (gx) {
    torch::stable::zero_(gx->pixels());
  }
  if (backward.empty_batch() || !backward.has_weights()) torch::stable::zero_(gw);
  // As they are returned: of the argument's dtype and shape, or empty.
  const auto result = [&](const MaybeTensor& t, Input input, const MaybeTensor& sum) {
    if (sum) return as(*sum, t->scalar_type());
    if (t && needs[input])
      return empty(std::vector<int64_t>(t->sizes().begin(), t->sizes().end()), t->scalar_type(), x);
    return empty({0}, t ? t->scalar_type() : ScalarType::Float, x);
  };
  return {gx ? gx->finish() : empty({0}, x.scalar_type(), x), gw, result(bias, kBias, gb),
          result(scale_table, kScale, gscale), result(shift_table, kShift, gshift)};
}

}  // namespace
}  // namespace effkern::sliced_conv

EFFKERN_CUDA_OPS(m) { m.impl("sliced_conv2d_ragged_backward", TORCH_BOX(&effkern::sliced_conv::ragged_backward)); }
