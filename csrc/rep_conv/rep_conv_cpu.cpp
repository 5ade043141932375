// rep_conv2d on the CPU: one convolution with bias, residual and activation in the store. The weight comes as a 4-d
// tensor, packed for this call, or as a handle made by pack_conv_weight.
#include <optional>
#include <string>
#include <vector>

#include "../common/direct_entry.h"
#include "../common/packed_weight.h"

namespace effkern::rep_conv {
namespace {

// What all forms do once the weight's dimensions are known. `bias` is that of the call; a handle carries its own.
// make(layout, type) gives the memory of the output.
template <class Make>
void convolve(const View& x, const View& weight, const PackedWeight::Dims& dims, const FloatVector& bias,
              const Geometry& g, const std::string& act, const MaybeView& residual, const std::string& algo,
              const char* op, const Make& make) {
  const conv::Activation in = activation(x, {op, "x"});
  EFFKERN_CHECK_VALUE(in.c == dims.in_per_group * dims.groups, op, ": x must have ", dims.in_per_group * dims.groups,
                      " channels (the weight's ", dims.in_per_group, " x groups = ", dims.groups, "), got ", in.c);
  const conv::Act activate = act_from_name(act, op);
  const conv::Algo algorithm = algo_from_name(algo, op);
  int64_t map[2];
  output_map(x, dims.kh, dims.kw, g, op, map);

  conv::Activation addend;
  if (residual.has_value()) {
    addend = activation(*residual, {op, "residual"});
    EFFKERN_CHECK_TYPE(residual->scalar_type() == x.scalar_type(), op, ": residual must have x's dtype");
    EFFKERN_CHECK_VALUE(addend.n == in.n && addend.c == dims.out_channels && addend.h == map[0] && addend.w == map[1],
                        op, ": residual must have the output's shape [", in.n, ", ", dims.out_channels, ", ", map[0],
                        ", ", map[1], "], got ", shape_text(*residual));
  }

  const Layout layout = layout_like(x, in.n, dims.out_channels, map[0], map[1]);
  void* y = make(layout, x.scalar_type());
  if (in.n * dims.out_channels == 0) return;
  const PackedWeight packed(weight, dims, {dims.groups, dims.out_channels / dims.groups, dims.in_per_group});
  conv::Problem problem;
  problem.algo = algorithm;
  problem.x = in;
  problem.y = activation(layout, y, x.scalar_type());
  problem.count = in.n;
  problem.c_in = in.c;
  problem.c_out = dims.out_channels;
  packed.attach(problem);
  set_geometry(problem, g);
  problem.epilogue.shift = bias ? bias.data() : packed.bias();
  problem.epilogue.residual = residual.has_value() ? &addend : nullptr;
  problem.epilogue.act = activate;
  conv::run(problem);
}

Tensor rep_conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, Text act,
                  const MaybeTensor& residual, Text algo) {
  constexpr const char* op = "rep_conv2d";
  float_dtype(x, {op, "x"});
  const ScalarType dtype = x.scalar_type();
  EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(weight), op, ": weight is a handle; call rep_conv2d_packed");
  const PackedWeight::Dims dims = PackedWeight::dims(weight, groups, {op, "weight"}, &dtype);
  const FloatVector b(bias, dims.out_channels, dtype, {op, "bias"});
  std::optional<Tensor> y;
  convolve(x, weight, dims, b, geometry(stride, padding, dilation, op), act, residual, algo, op, into(y));
  return *y;
}

template <class Make>
void convolve_packed(const View& x, const View& handle, int64_t out_channels, const int64_t kernel[2],
                     const Geometry& g, int64_t groups, const std::string& act, const MaybeView& residual,
                     const std::string& algo, const Make& make) {
  constexpr const char* op = "rep_conv2d_packed";
  EFFKERN_CHECK_TYPE(PackedWeight::is_handle(handle), op,
                     ": handle must be a 1-d uint8 tensor made by pack_conv_weight, got shape ", shape_text(handle));
  const PackedWeight::Dims dims = PackedWeight::dims(handle, groups, {op, "handle"});
  EFFKERN_CHECK_VALUE(dims.out_channels == out_channels && dims.kh == kernel[0] && dims.kw == kernel[1], op,
                      ": handle was packed for ", dims.out_channels, " output channels and a ", dims.kh, "x", dims.kw,
                      " kernel, got out_channels = ", out_channels, " and kernel_size = ", kernel[0], "x", kernel[1]);
  convolve(x, handle, dims, FloatVector(), g, act, residual, algo, op, make);
}

Tensor rep_conv2d_packed(const Tensor& x, const Tensor& handle, int64_t out_channels, std::vector<int64_t> kernel_size,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups, Text act, const MaybeTensor& residual, Text algo) {
  constexpr const char* op = "rep_conv2d_packed";
  EFFKERN_CHECK_VALUE(kernel_size.size() == 2, op, ": kernel_size must have 2 entries, got ", kernel_size.size());
  std::optional<Tensor> y;
  convolve_packed(x, handle, out_channels, kernel_size.data(), geometry(stride, padding, dilation, op), groups, act,
                  residual, algo, into(y));
  return *y;
}

Tensor pack_conv_weight(const Tensor& weight, const MaybeTensor& bias, int64_t groups, Text algo) {
  constexpr const char* op = "pack_conv_weight";
  const bool winograd = algo == "winograd";
  EFFKERN_CHECK_VALUE(winograd || algo == "auto" || algo == "direct", op,
                      ": algo must be auto, direct or winograd, got '", algo, "'");
  return pack_handle(weight, bias, groups, winograd, op);
}

}  // namespace
}  // namespace effkern::rep_conv

EFFKERN_EXPORT int effkern_rep_conv2d_packed(const effkern::direct::RepConv* call,
                                             const effkern::direct::Output* output) {
  using namespace effkern;
  return direct::entry(*output, [&](const auto& make) {
    const Geometry g = geometry(call->stride, call->padding, call->dilation, "rep_conv2d_packed");
    rep_conv::convolve_packed(direct::view(call->x), direct::view(call->handle), call->out_channels, call->kernel, g,
                              call->groups, call->act, direct::maybe_view(call->residual), call->algo, make);
  });
}

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("rep_conv2d", TORCH_BOX(&effkern::rep_conv::rep_conv2d));
  m.impl("rep_conv2d_packed", TORCH_BOX(&effkern::rep_conv::rep_conv2d_packed));
  m.impl("pack_conv_weight", TORCH_BOX(&effkern::rep_conv::pack_conv_weight));
}
