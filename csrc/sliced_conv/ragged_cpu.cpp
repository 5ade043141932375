// Ragged sliced convolution on the CPU: samples sorted into width classes, the weight packed once for the widest of
// them, the engine called once a class with a row list. No activation is gathered or copied.
#include <algorithm>

#include "calls.h"
#include "ragged.h"
#include "slice.h"
#include "tables.h"

namespace effkern::sliced_conv {
namespace {

Tensor run(const RaggedArguments& a) {
  const char* op = a.op;
  const conv::Activation in = activation(a.x, {op, "x"});
  const ScalarType dtype = a.x.scalar_type();
  const bool handle = PackedWeight::is_handle(a.weight);
  const PackedWeight::Dims dims = PackedWeight::dims(a.weight, a.groups, {op, "weight"}, handle ? nullptr : &dtype);
  const Geometry g = geometry(a.stride, a.padding, a.dilation, op);
  const conv::Algo algo = algo_from_name(a.algo, op);
  check_group_mode(a.group_mode, op);
  const conv::Act act = act_from_name(a.act, op);
  EFFKERN_CHECK_VALUE(a.c_out_max >= 0 && a.c_out_max <= dims.out_channels, op, ": c_out_max must be in [0, ",
                      dims.out_channels, "], got ", a.c_out_max);
  const std::vector<int64_t> c_in =
      read_widths(a.c_in, in.n, std::min(in.c, dims.in_per_group * dims.groups), {op, "c_in"});
  const std::vector<int64_t> c_out = read_widths(a.c_out, in.n, a.c_out_max, {op, "c_out"});
  const Classes classes = sort_classes(c_in, c_out);
  std::vector<RunningPart> parts;
  RunningPart widest{0, 0, 0};
  for (const WidthClass& c : classes.list) {
    const std::string sample = "[" + std::to_string(classes.order[c.begin]) + "]";
    parts.push_back(running_part(dims, c.c_in, c.c_out, a.group_mode, {op, "c_in" + sample, "c_out" + sample}));
    widest.groups = std::max(widest.groups, parts.back().groups);
    widest.out_per_group = std::max(widest.out_per_group, parts.back().out_per_group);
    widest.in_per_group = std::max(widest.in_per_group, parts.back().in_per_group);
  }
  int64_t map[2];
  output_map(a.x, dims.kh, dims.kw, g, op, map);
  Tensor y = like_input(a.x, in.n, a.c_out_max, map[0], map[1]);

  const PackedWeight packed(a.weight, dims, widest);
  Tables tables(op, dims, packed.bias(), a.bias, a.scale_table, a.shift_table, a.width_idx, in.n, a.c_out_max, dtype);
  if (y.numel() == 0) return y;
  const conv::Activation out = activation(y, {op, "y"});
  for (size_t i = 0; i < parts.size(); ++i) {
    const WidthClass& c = classes.list[i];
    if (c.c_out == 0) continue;
    conv::Problem problem;
    problem.algo = algo;
    problem.x = in;
    problem.y = out;
    problem.count = c.end - c.begin;
    problem.x_rows = problem.y_rows = classes.order.data() + c.begin;
    problem.c_in = c.c_in;
    problem.c_out = c.c_out;
    packed.attach(problem);
    problem.groups = parts[i].groups;
    set_geometry(problem, g);
    problem.epilogue = tables.epilogue(dims, parts[i], act);
    conv::run(problem);
  }
  if (a.zero_tail) zero_tails(out, c_out);
  return y;
}

Tensor run_weight(const RaggedArguments& a) {
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(a.weight), a.op,
                      ": weight is a handle; call sliced_conv2d_ragged_packed");
  return run(a);
}

Tensor conv2d_packed(const Tensor& x, const Tensor& handle, int64_t out_channels, std::vector<int64_t> kernel_size,
                     const Tensor& c_in, const Tensor& c_out, int64_t c_out_max, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, Text group_mode,
                     const MaybeTensor& scale_table, const MaybeTensor& shift_table, const MaybeTensor& width_idx,
                     Text act, Text algo, bool zero_tail) {
  const char* op = "sliced_conv2d_ragged_packed";
  check_handle(handle, out_channels, kernel_size, groups, op);
  return run({op, x, handle, std::nullopt, c_in, c_out, c_out_max, stride, padding, dilation, groups, group_mode,
              scale_table, shift_table, width_idx, act, algo, zero_tail});
}

}  // namespace
}  // namespace effkern::sliced_conv

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("sliced_conv2d_ragged", TORCH_BOX(&effkern::sliced_conv::ragged_conv2d<effkern::sliced_conv::run_weight>));
  m.impl("sliced_conv2d_ragged_packed", TORCH_BOX(&effkern::sliced_conv::conv2d_packed));
  m.impl("sliced_linear_ragged", TORCH_BOX(&effkern::sliced_conv::ragged_linear<effkern::sliced_conv::run_weight>));
}
