// Uniform sliced convolution and linear layer on the CPU: checks, the running part of the weight, one engine call.
#include <vector>

#include "../common/direct_entry.h"
#include "../common/packed_weight.h"
#include "calls.h"
#include "slice.h"

namespace effkern::sliced_conv {
namespace {

// A call, its tensors as views.
struct Call {
  const WidthNames& names;
  View x, weight;
  MaybeView bias, scale, shift;
  int64_t c_out;
  Geometry geometry;
  int64_t groups;
  const std::string &group_mode, &act, &algo;
};

// make(layout, type) gives the memory of the output.
template <class Make>
void convolve(const Call& a, const Make& make) {
  const char* op = a.names.op;
  const conv::Activation in = activation(a.x, {op, "x"});
  const ScalarType dtype = a.x.scalar_type();
  const bool handle = PackedWeight::is_handle(a.weight);
  const PackedWeight::Dims dims = PackedWeight::dims(a.weight, a.groups, {op, "weight"}, handle ? nullptr : &dtype);
  const RunningPart part = running_part(dims, in.c, a.c_out, a.group_mode, a.names);
  const conv::Algo algo = algo_from_name(a.algo, op);
  const conv::Act act = act_from_name(a.act, op);
  const FloatVector bias = first(a.bias, bias_size(dims, part), dtype, {op, "bias"});
  const FloatVector scale = first(a.scale, a.c_out, dtype, {op, "scale"}, /*finite=*/true);
  const FloatVector shift = first(a.shift, a.c_out, dtype, {op, "shift"});
  int64_t map[2];
  output_map(a.x, dims.kh, dims.kw, a.geometry, op, map);

  const Layout layout = layout_like(a.x, in.n, a.c_out, map[0], map[1]);
  void* y = make(layout, dtype);
  if (in.n * a.c_out == 0) return;
  const PackedWeight packed(a.weight, dims, part);
  const float* added = bias ? bias.data() : packed.bias();
  std::vector<float> combined;
  if (added != nullptr) {
    combined.resize(static_cast<size_t>(a.c_out));
    add_bias(added, scale.data(), shift.data(), dims, part, combined.data());
  }
  conv::Problem problem;
  problem.algo = algo;
  problem.x = in;
  problem.y = activation(layout, y, dtype);
  problem.count = in.n;
  problem.c_in = in.c;
  problem.c_out = a.c_out;
  packed.attach(problem);
  set_geometry(problem, a.geometry);
  problem.epilogue.scale = scale.data();
  problem.epilogue.shift = added != nullptr ? combined.data() : shift.data();
  problem.epilogue.act = act;
  conv::run(problem);
}

Tensor run(const UniformArguments& a) {
  std::optional<Tensor> y;
  const Geometry g = geometry(a.stride, a.padding, a.dilation, a.names.op);
  convolve({a.names, a.x, a.weight, a.bias, a.scale, a.shift, a.c_out, g, a.groups, a.group_mode, a.act, a.algo},
           into(y));
  return *y;
}

Tensor run_weight(const UniformArguments& a) {
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(a.weight), a.names.op,
                      ": weight is a handle; call sliced_conv2d_packed");
  return run(a);
}

Tensor conv2d_packed(const Tensor& x, const Tensor& handle, int64_t out_channels, std::vector<int64_t> kernel_size,
                     int64_t c_out, std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, Text group_mode, const MaybeTensor& scale,
                     const MaybeTensor& shift, Text act, Text algo) {
  const char* op = "sliced_conv2d_packed";
  check_handle(handle, out_channels, kernel_size, groups, op);
  return run({{op, "x's channels", "c_out"},
              x,
              handle,
              std::nullopt,
              c_out,
              stride,
              padding,
              dilation,
              groups,
              group_mode,
              scale,
              shift,
              act,
              algo});
}

}  // namespace
}  // namespace effkern::sliced_conv

EFFKERN_EXPORT int effkern_sliced_conv2d_packed(const effkern::direct::SlicedConv* call,
                                                const effkern::direct::Output* output) {
  using namespace effkern;
  return direct::entry(*output, [&](const auto& make) {
    const sliced_conv::WidthNames names{"sliced_conv2d_packed", "x's channels", "c_out"};
    const View whole = direct::view(call->x), handle = direct::view(call->handle);
    EFFKERN_CHECK_VALUE(whole.dim() == 4 && call->c_in <= whole.size(1), names.op, ": x has fewer channels");
    const int64_t c_in = call->c_in < 0 ? whole.size(1) : call->c_in;
    const int64_t sizes[4] = {whole.size(0), c_in, whole.size(2), whole.size(3)};
    sliced_conv::check_handle(handle, call->out_channels, {call->kernel, call->kernel + 2}, call->groups, names.op);
    const Geometry g = geometry(call->stride, call->padding, call->dilation, names.op);
    const std::string group_mode = call->group_mode, act = call->act, algo = call->algo;
    sliced_conv::convolve({names, whole.leading(sizes), handle, std::nullopt, direct::maybe_view(call->scale),
                           direct::maybe_view(call->shift), call->c_out, g, call->groups, group_mode, act, algo},
                          make);
  });
}

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("sliced_conv2d", TORCH_BOX(&effkern::sliced_conv::uniform_conv2d<effkern::sliced_conv::run_weight>));
  m.impl("sliced_conv2d_packed", TORCH_BOX(&effkern::sliced_conv::conv2d_packed));
  m.impl("sliced_linear", TORCH_BOX(&effkern::sliced_conv::uniform_linear<effkern::sliced_conv::run_weight>));
}
