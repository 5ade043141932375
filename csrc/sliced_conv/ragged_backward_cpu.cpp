// Gradients of the ragged convolution on the CPU, one width class after another with lists of rows: nothing is
// gathered.
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/packed_weight.h"
#include "../conv_backward/dgrad.h"
#include "../conv_backward/epilogue_grad.h"
#include "../conv_backward/wgrad.h"
#include "ragged.h"
#include "slice.h"
#include "tables.h"

namespace effkern::sliced_conv {
namespace {

constexpr const char* kOp = "sliced_conv2d_ragged_backward";
enum Input { kX, kWeight, kBias, kScale, kShift };

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor contiguous(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, like.device());
}

// Zeros of a tensor's shape and dtype where its gradient is wanted, else nothing.
Tensor zeros_of(const MaybeTensor& t, bool wanted, const Tensor& x) {
  std::vector<int64_t> sizes{0};
  if (t.has_value() && wanted) sizes.assign(t->sizes().begin(), t->sizes().end());
  Tensor zeros = contiguous(sizes, t.has_value() ? t->scalar_type() : ScalarType::Float, x);
  if (zeros.numel() > 0)
    std::memset(zeros.mutable_data_ptr(), 0, static_cast<size_t>(zeros.numel() * zeros.element_size()));
  return zeros;
}

// fp32 maps of gy's shape, channels side by side.
Tensor scratch_like(const Tensor& gy) {
  const int64_t size[] = {gy.size(0), gy.size(1), gy.size(2), gy.size(3)};
  return torch::stable::empty({size, 4}, ScalarType::Float, std::nullopt, gy.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

template <class T>
void store(const std::vector<T>& from, const Tensor& to) {
  const DType dtype = float_dtype(to, {kOp, "a gradient"});
  for (size_t i = 0; i < from.size(); ++i)
    store_float(to.mutable_data_ptr(), dtype, static_cast<int64_t>(i), static_cast<float>(from[i]));
}

// Sums over samples in index order: row table_row[n] of the gradient gets channels [0, c_out[n]) of sample n.
void store_table(const std::vector<double>& sums, int64_t channels, const int32_t* table_row, const Tensor& to) {
  const int64_t columns = to.size(1), samples = static_cast<int64_t>(sums.size()) / std::max<int64_t>(channels, 1);
  std::vector<double> table(static_cast<size_t>(to.numel()));
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < channels; ++c) table[table_row[n] * columns + c] += sums[n * channels + c];
  store(table, to);
}

Grads ragged_backward(const Tensor& grad, const Tensor& y, const Tensor& x, const Tensor& weight,
                      const MaybeTensor& bias, const Tensor& c_in, const Tensor& c_out, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, Text group_mode,
                      const MaybeTensor& scale_table, const MaybeTensor& shift_table, const MaybeTensor& width_idx,
                      Text act_name, Text algo_name, std::vector<bool> needs) {
  const conv::Activation in = activation(x, {kOp, "x"}), gy = activation(grad, {kOp, "grad"});
  const conv::Activation out = activation(y, {kOp, "y"});
  const ScalarType dtype = x.scalar_type();
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(weight), kOp, ": weight must be 4-d, got a handle");
  const PackedWeight::Dims dims = PackedWeight::dims(weight, groups, {kOp, "weight"}, &dtype);
  const Geometry g = geometry(stride, padding, dilation, kOp);
  const conv::Algo algo = algo_from_name(algo_name, kOp);
  const conv::Act act = act_from_name(act_name, kOp);
  check_group_mode(group_mode, kOp);
  EFFKERN_CHECK_VALUE(needs.size() == 5, kOp, ": needs must have 5 values, got ", needs.size());
  int64_t map[2];
  output_map(x, dims.kh, dims.kw, g, kOp, map);
  EFFKERN_CHECK_VALUE(gy.n == in.n && gy.h == map[0] && gy.w == map[1] && gy.c <= dims.out_channels, kOp,
                      ": grad must have shape [", in.n, ", at most ", dims.out_channels, ", ", map[0], ", ", map[1],
                      "], got ", shape_text(grad));
  EFFKERN_CHECK_VALUE(out.n == gy.n && out.c == gy.c && out.h == gy.h && out.w == gy.w, kOp,
                      ": y must have grad's shape ", shape_text(grad), ", got ", shape_text(y));
  std::vector<int64_t> ins = read_widths(c_in, in.n, std::min(in.c, dims.in_per_group * dims.groups), {kOp, "c_in"});
  const std::vector<int64_t> outs = read_widths(c_out, in.n, gy.c, {kOp, "c_out"});
  const Classes classes = sort_classes(ins, outs);
  std::vector<RunningPart> parts;
  RunningPart widest{0, 0, 0};
  for (const WidthClass& c : classes.list) {
    const std::string sample = "[" + std::to_string(classes.order[c.begin]) + "]";
    parts.push_back(running_part(dims, c.c_in, c.c_out, group_mode, {kOp, "c_in" + sample, "c_out" + sample}));
    widest.groups = std::max(widest.groups, parts.back().groups);
    widest.out_per_group = std::max(widest.out_per_group, parts.back().out_per_group);
    widest.in_per_group = std::max(widest.in_per_group, parts.back().in_per_group);
  }
  const Tables tables(kOp, dims, nullptr, bias, scale_table, shift_table, width_idx, in.n, gy.c, dtype);

  Tensor gx = needs[kX] ? like_input(x, in.n, in.c, in.h, in.w) : zeros_of(x, false, x);
  const Tensor gw = zeros_of(weight, needs[kWeight], x), gb = zeros_of(bias, needs[kBias], x);
  const Tensor gscale = zeros_of(scale_table, needs[kScale], x), gshift = zeros_of(shift_table, needs[kShift], x);
  const bool want_gw = gw.numel() > 0, want_gb = gb.numel() > 0;
  const bool want_scale = gscale.numel() > 0, want_shift = gshift.numel() > 0;
  if (needs[kX] && gx.numel() > 0) {
    for (int64_t n = 0; n < in.n; ++n)
      if (outs[n] == 0) ins[n] = 0;  // nothing ran
    zero_tails(activation(gx, {kOp, "gx"}), ins);
  }
  if (gy.n * gy.c * gy.h * gy.w == 0) return {gx, gw, gb, gscale, gshift};

  const auto problem_of = [&](size_t i, auto& p) {
    const WidthClass& c = classes.list[i];
    p.count = c.end - c.begin;
    for (int k = 0; k < 2; ++k) p.stride[k] = g.stride[k], p.pad[k] = g.pad[k], p.dil[k] = g.dil[k];
    return classes.order.data() + c.begin;
  };
  Tensor z, gz;
  conv::Activation back = gy;
  if (act != conv::Act::None || tables.scale() != nullptr || want_shift) {
    conv::EpilogueGrad e;
    if (want_scale || act == conv::Act::Hardswish || act == conv::Act::Silu) {
      z = scratch_like(grad);
      const PackedWeight packed(weight, dims, widest);
      Tables biased(kOp, dims, nullptr, bias, std::nullopt, std::nullopt, std::nullopt, in.n, gy.c, dtype);
      for (size_t i = 0; i < parts.size(); ++i) {
        if (classes.list[i].c_out == 0) continue;
        conv::Problem p;
        p.algo = algo;
        p.x = in, p.y = activation(z, {kOp, "z"});
        p.x_rows = p.y_rows = problem_of(i, p);
        p.c_in = classes.list[i].c_in, p.c_out = classes.list[i].c_out;
        packed.attach(p);
        p.groups = parts[i].groups;
        p.epilogue = biased.epilogue(dims, parts[i], conv::Act::None);
        conv::run(p);
      }
      e.z = activation(z, {kOp, "z"});
    }
    gz = scratch_like(grad);
    back = activation(gz, {kOp, "gz"});
    std::vector<double> sums(want_shift ? static_cast<size_t>(gy.n * gy.c) : 0);
    std::vector<double> sums_z(want_scale ? static_cast<size_t>(gy.n * gy.c) : 0);
    e.gy = gy, e.y = out, e.g = back;
    e.channels = outs.data();
    e.act = act;
    e.scale = tables.scale(), e.shift = tables.shift();
    e.table_stride = gy.c;
    e.table_row = tables.rows();
    if (want_shift) e.sums = sums.data();
    if (want_scale) e.sums_z = sums_z.data();
    conv::epilogue_grad(e);
    if (want_shift) store_table(sums, gy.c, tables.rows(), gshift);
    if (want_scale) store_table(sums_z, gy.c, tables.rows(), gscale);
  }

  // Sums over samples are in fp32 whatever the weight is, and rounded once.
  Tensor sum = gw;
  if (want_gw && dtype != ScalarType::Float) {
    sum = contiguous({dims.out_channels, dims.in_per_group, dims.kh, dims.kw}, ScalarType::Float, x);
    std::memset(sum.mutable_data_ptr(), 0, static_cast<size_t>(sum.numel()) * sizeof(float));
  }
  std::vector<float> bias_sum(want_gb ? static_cast<size_t>(dims.out_channels) : 0), part_sum;
  for (size_t i = 0; i < parts.size(); ++i) {
    const WidthClass& c = classes.list[i];
    const RunningPart& part = parts[i];
    if (c.c_out == 0) continue;
    if (needs[kX] && c.c_in > 0 && in.h * in.w > 0) {
      conv::DgradProblem p;
      p.gy = back, p.gx = activation(gx, {kOp, "gx"});
      p.gy_rows = p.gx_rows = problem_of(i, p);
      p.weight = weight_view(weight, dims, part);
      p.algo = algo;
      conv::dgrad(p);
    }
    if (!want_gw && !want_gb) continue;
    conv::WgradProblem p;
    p.x = in, p.gy = back;
    p.x_rows = p.gy_rows = problem_of(i, p);
    p.c_in = c.c_in, p.c_out = c.c_out;
    p.groups = part.groups;
    p.kh = dims.kh, p.kw = dims.kw;
    p.accumulate = true;
    if (want_gw && c.c_in > 0) {
      const conv::WeightView view = weight_view(sum, dims, part);
      p.gw = {sum.mutable_data_ptr(), view.dtype, view.group_stride, view.so, view.si, view.sh, view.sw};
    }
    part_sum.assign(want_gb ? static_cast<size_t>(c.c_out) : 0, 0.0f);
    if (want_gb) p.gb = part_sum.data();
    if (p.gw.data == nullptr && p.gb == nullptr) continue;
    conv::wgrad(p);
    for (size_t k = 0; k < part_sum.size(); ++k) {
      const int64_t channel = static_cast<int64_t>(k), group = channel / part.out_per_group;
      bias_sum[group * (dims.out_channels / dims.groups) + channel % part.out_per_group] += part_sum[k];
    }
  }
  if (want_gw && dtype != ScalarType::Float) {
    const float* from = static_cast<const float*>(sum.const_data_ptr());
    store(std::vector<float>(from, from + sum.numel()), gw);
  }
  if (want_gb) store(bias_sum, gb);
  return {gx, gw, gb, gscale, gshift};
}

}  // namespace
}  // namespace effkern::sliced_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("sliced_conv2d_ragged_backward", TORCH_BOX(&effkern::sliced_conv::ragged_backward));
}
