// Ragged sliced convolution on CUDA: one block sorts the samples into width classes, then one launch walks the tiles of
// all classes. Widths never come to the host, so nothing waits and a graph can be captured; for the same reason widths
// that do not fit are held to what does, where the CPU raises.
#include <string>
#include <vector>

#include "../conv/conv_op.h"
#include "calls.h"
#include "schedule.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

Tensor convolve(const RaggedArguments& a) {
  const char* op = a.op;
  const Tensor& x = a.x;
  const device::Scope scope(x, {op, "x"});
  const Tensor in = device::pixels(x, x, {op, "x"});
  const ScalarType dtype = x.scalar_type();
  device::check_here(a.weight, x, {op, "weight"});
  const PackedWeight::Dims dims = weight_dims(a.weight, a.groups, {op, "weight"}, &dtype);
  check_group_mode(a.group_mode, op);
  const bool depthwise = conv::gpu::is_depthwise({dims.groups, dims.out_channels / dims.groups, dims.in_per_group}) &&
                         a.group_mode == "prefix_groups";
  EFFKERN_CHECK_VALUE(a.groups == 1 || depthwise, op,
                      ": groups must be 1 on the GPU where widths differ by sample, or as many as channels, got ",
                      a.groups);
  const Geometry g = geometry(a.stride, a.padding, a.dilation, op);
  check_algo(a.algo, op);
  const conv::Act act = act_from_name(a.act, op);
  EFFKERN_CHECK_VALUE(a.c_out_max >= 0 && a.c_out_max <= dims.out_channels, op, ": c_out_max must be in [0, ",
                      dims.out_channels, "], got ", a.c_out_max);
  const int64_t n = x.size(0), most_in = std::min(x.size(1), dims.in_per_group * dims.groups);
  Schedule schedule{};
  schedule.c_in = conv::gpu::indices(scope, a.c_in, x, {op, "c_in"});
  schedule.c_out = conv::gpu::indices(scope, a.c_out, x, {op, "c_out"});
  const MaybeTensor bias = device::vector(a.bias, dims.out_channels, true, dtype, x, {op, "bias"});
  const MaybeTensor scale = device::table(a.scale_table, a.c_out_max, dtype, x, {op, "scale_table"});
  const MaybeTensor shift = device::table(a.shift_table, a.c_out_max, dtype, x, {op, "shift_table"});
  const bool tables = scale.has_value() || shift.has_value();
  EFFKERN_CHECK_VALUE(tables == a.width_idx.has_value(), op, ": width_idx must be given with, and only with, tables");
  EFFKERN_CHECK_VALUE(!scale || !shift || scale->size(0) == shift->size(0), op,
                      ": scale_table and shift_table must have as many rows, got ", scale ? scale->size(0) : 0, " and ",
                      shift ? shift->size(0) : 0);
  int64_t map[2];
  output_map(x, dims.kh, dims.kw, g, op, map);
  device::Output y(x, a.c_out_max, map[0], map[1]);
  if (y.pixels().numel() == 0) return y.finish();

  if (tables) EFFKERN_CHECK_VALUE((scale ? scale : shift)->size(0) > 0, op, ": the tables must have at least one row");
  const int64_t rows = tables ? (scale ? scale : shift)->size(0) : 0;
  conv::gpu::Question question{.op = op,
                               .x = in,
                               .weight = a.weight,
                               .y = y.pixels(),
                               .dims = dims,
                               .part = {1, a.c_out_max, most_in},
                               .geometry = g,
                               .act = act,
                               .bias = bias,
                               .scale = scale,
                               .shift = shift,
                               .table_stride = a.c_out_max,
                               .samples = n,
                               .zero_to = a.zero_tail ? a.c_out_max : 0};
  if (depthwise) {  // no weight is shared between samples: nothing to sort
    question.part = {std::min(a.c_out_max, most_in), 1, 1};
    question.c_in = a.c_in, question.c_out = a.c_out;
    question.table = a.width_idx, question.most_row = rows - 1;
    conv::gpu::run(scope, question);
    return y.finish();
  }
  Tensor order = device::empty_ints(n, x), parts = device::empty_ints(4 * n, x), count = device::empty_ints(1, x);
  MaybeTensor table_row;
  if (tables) {
    schedule.table = conv::gpu::indices(scope, *a.width_idx, x, {op, "width_idx"});
    schedule.most_row = static_cast<int32_t>(rows - 1);
    table_row = device::empty_ints(n, x);
    schedule.table_row = scope.of<int32_t>(*table_row);
  }
  schedule.samples = static_cast<int32_t>(n);
  schedule.most_in = static_cast<int32_t>(most_in), schedule.most_out = static_cast<int32_t>(a.c_out_max);
  schedule.order = scope.of<int32_t>(order);
  schedule.parts = scope.of<int32_t>(parts).as<Part>();
  schedule.part_count = scope.of<int32_t>(count);
  run(schedule, scope.stream());
  question.weight = device::taps(a.weight);
  question.table_row = table_row;
  question.x_rows = question.y_rows = order;
  question.parts = parts, question.part_count = count;
  conv::gpu::run(scope, question);
  return y.finish();
}

}  // namespace
}  // namespace effkern::sliced_conv

EFFKERN_CUDA_OPS(m) {
  m.impl("sliced_conv2d_ragged", TORCH_BOX(&effkern::sliced_conv::ragged_conv2d<effkern::sliced_conv::convolve>));
  m.impl("sliced_linear_ragged", TORCH_BOX(&effkern::sliced_conv::ragged_linear<effkern::sliced_conv::convolve>));
}
