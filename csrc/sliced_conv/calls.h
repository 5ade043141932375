// The signatures of the sliced ops, once for every device: their arguments by name, and linear layers as 1x1
// convolutions.
#pragma once

#include <string>
#include <vector>

#include "slice.h"

namespace effkern::sliced_conv {

struct UniformArguments {
  const WidthNames& names;
  const Tensor &x, &weight;  // the weight whole, or a handle, which carries its own bias
  MaybeTensor bias;
  int64_t c_out;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  std::string group_mode;
  const MaybeTensor &scale, &shift;
  std::string act, algo;
};

struct RaggedArguments {
  const char* op;
  const Tensor &x, &weight;  // as above
  MaybeTensor bias;
  const Tensor &c_in, &c_out;
  int64_t c_out_max;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  std::string group_mode;
  const MaybeTensor &scale_table, &shift_table, &width_idx;
  std::string act, algo;
  bool zero_tail;  // else channels past c_out[n] are left as they are allocated
};

template <Tensor (*kRun)(const UniformArguments&)>
Tensor uniform_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t c_out,
                      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      int64_t groups, Text group_mode, const MaybeTensor& scale, const MaybeTensor& shift, Text act,
                      Text algo) {
  const WidthNames names{"sliced_conv2d", "x's channels", "c_out"};
  return kRun({names, x, weight, bias, c_out, stride, padding, dilation, groups, group_mode, scale, shift, act, algo});
}

template <Tensor (*kRun)(const UniformArguments&)>
Tensor uniform_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t out_features,
                      const MaybeTensor& scale, const MaybeTensor& shift, Text act, Text algo) {
  const char* op = "sliced_linear";
  const WidthNames names{op, "x's features", "out_features"};
  const Tensor maps = as_map(x, {op, "x"}), kernel = as_map(weight, {op, "weight"});
  const Tensor y = kRun(
      {names, maps, kernel, bias, out_features, {1, 1}, {0, 0}, {1, 1}, 1, "prefix_groups", scale, shift, act, algo});
  return torch::stable::flatten(y, 1, -1);
}

template <Tensor (*kRun)(const RaggedArguments&)>
Tensor ragged_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& c_in,
                     const Tensor& c_out, int64_t c_out_max, std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, Text group_mode, const MaybeTensor& scale_table,
                     const MaybeTensor& shift_table, const MaybeTensor& width_idx, Text act, Text algo,
                     bool zero_tail) {
  return kRun({"sliced_conv2d_ragged", x, weight, bias, c_in, c_out, c_out_max, stride, padding, dilation, groups,
               group_mode, scale_table, shift_table, width_idx, act, algo, zero_tail});
}

template <Tensor (*kRun)(const RaggedArguments&)>
Tensor ragged_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& c_in,
                     const Tensor& c_out, int64_t c_out_max, const MaybeTensor& scale_table,
                     const MaybeTensor& shift_table, const MaybeTensor& width_idx, Text act, Text algo,
                     bool zero_tail) {
  const char* op = "sliced_linear_ragged";
  const Tensor maps = as_map(x, {op, "x"}), kernel = as_map(weight, {op, "weight"});
  const Tensor y = kRun({op,
                         maps,
                         kernel,
                         bias,
                         c_in,
                         c_out,
                         c_out_max,
                         {1, 1},
                         {0, 0},
                         {1, 1},
                         1,
                         "prefix_groups",
                         scale_table,
                         shift_table,
                         width_idx,
                         act,
                         algo,
                         zero_tail});
  return torch::stable::flatten(y, 1, -1);
}

}  // namespace effkern::sliced_conv
