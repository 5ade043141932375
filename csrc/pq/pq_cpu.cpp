// pq_linear, pq_conv2d and pq_decode on the CPU: checks, then one of the algorithms for coded weights.
#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "choose.h"
#include "coded.h"
#include "rows.h"

namespace effkern::pq {
namespace {

// The algorithm asked for, or the one chosen; ValueError where it cannot run the layer.
Algo algorithm(const std::string& algo, const conv::Problem& problem, const CodedMatrix& m, const char* op) {
  if (algo == "auto") return choose(problem, m);
  if (algo == "panel" || algo == "direct") return Algo::Panel;
  EFFKERN_CHECK_VALUE(algo == "decode_fma" || algo == "lut", op,
                      ": algo must be auto, decode_fma, panel, lut or direct, got '", algo, "'");
  EFFKERN_CHECK_VALUE(fits_rows(problem), op,
                      ": algo must be auto, panel or direct but for a 1x1 kernel without padding", " and groups, got '",
                      algo, "'");
  EFFKERN_CHECK_VALUE(algo != "lut" || fits_lut(problem, m), op, ": algo must not be lut for codes of more than one ",
                      "stage or codebooks of more than ", kTableEntries, " entries, got ", m.stages, " and ",
                      m.entries);
  return algo == "lut" ? Algo::Lut : Algo::DecodeFma;
}

// Everything but the geometry: the epilogue, the weight and the call.
void run_layer(conv::Problem& problem, const CodedTensor& coded, const float* scale, const float* bias, conv::Act act,
               Algo algo, const char* op) {
  const int64_t taps = problem.kh * problem.kw, channels = problem.c_in / problem.groups;
  const int64_t pixels = problem.y.h * problem.y.w;
  problem.count = problem.x.n;
  problem.epilogue.scale = scale;
  problem.epilogue.shift = bias;
  problem.epilogue.act = act;
  if (algo == Algo::DecodeFma) {
    run_dots({problem, 0, pixels}, coded.decoder());
  } else if (algo == Algo::Lut) {
    const int64_t left = left_to_dots(pixels);
    run_lut({problem, 0, pixels - left}, coded.decoder());
    if (left > 0) run_dots({problem, pixels - left, pixels}, coded.decoder());
  } else if (channels == 1 && problem.groups == problem.c_out) {
    std::vector<float> kernels(static_cast<size_t>(taps * problem.c_out));
    decode_depthwise(coded.decoder(), taps, kernels.data());
    problem.depthwise = kernels.data();
    problem.depthwise_stride = problem.c_out;
    conv::run(problem);
  } else {
    const CodedPanels panels(coded.decoder(), problem.groups, channels, taps);
    problem.weight = &panels;
    conv::run(problem);
  }
  coded.check_codes(op);
}

Tensor pq_conv2d(const Tensor& x, const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale,
                 const MaybeTensor& bias, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, Text act, Text algo) {
  constexpr const char* kOp = "pq_conv2d";
  const conv::Activation in = activation(x, {kOp, "x"});
  EFFKERN_CHECK_VALUE(kernel_size.size() == 2, kOp, ": kernel_size must have 2 values, got ", kernel_size.size());
  const Geometry g = geometry(stride, padding, dilation, kOp);
  int64_t map[2];
  output_map(x, kernel_size[0], kernel_size[1], g, kOp, map);
  EFFKERN_CHECK_VALUE(codes.dim() >= 1, kOp, ": codes must be [Co, J] or [Co, J, m], got a scalar");
  const int64_t c_out = codes.size(0);
  EFFKERN_CHECK_VALUE(groups >= 1 && in.c % groups == 0 && c_out % groups == 0, kOp, ": groups must divide x's ", in.c,
                      " channels and the ", c_out, " rows of codes, got ", groups);
  const int64_t taps = kernel_size[0] * kernel_size[1];
  EFFKERN_CHECK_VALUE(taps < (int64_t{1} << 31), kOp, ": kernel_size must be smaller, got (", kernel_size[0], ", ",
                      kernel_size[1], ")");
  const CodedTensor coded(codes, codebook, in.c / groups * taps, kOp);
  const FloatVector factor(scale, c_out, x.scalar_type(), {kOp, "scale"}, /*finite=*/true);
  const FloatVector addend(bias, c_out, x.scalar_type(), {kOp, "bias"});

  Tensor y = like_input(x, in.n, c_out, map[0], map[1]);
  const conv::Act activate = act_from_name(act, kOp);
  conv::Problem problem;
  problem.x = in;
  problem.y = activation(y, {kOp, "y"});
  problem.c_in = in.c;
  problem.c_out = c_out;
  problem.groups = groups;
  problem.kh = kernel_size[0];
  problem.kw = kernel_size[1];
  set_geometry(problem, g);
  const Algo how = algorithm(algo, problem, coded.matrix(), kOp);
  if (algo == "direct") problem.algo = conv::Algo::Direct;
  if (y.numel() == 0) {
    coded.check_all_codes(kOp);
    return y;
  }
  run_layer(problem, coded, factor.data(), addend.data(), activate, how, kOp);
  return y;
}

// A matrix [rows][columns] as rows of 1x1 maps.
conv::Activation matrix_of(const Tensor& t, DType dtype, int64_t columns) {
  conv::Activation a;
  a.data = const_cast<void*>(t.const_data_ptr());
  a.dtype = dtype;
  a.n = t.size(0);
  a.c = columns;
  a.h = a.w = 1;
  a.sn = t.stride(0);
  a.sc = columns == 1 ? 1 : t.stride(1);
  return a;
}

Tensor pq_linear(const Tensor& x, const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale,
                 const MaybeTensor& bias, Text act, Text algo) {
  constexpr const char* kOp = "pq_linear";
  check_cpu(x, {kOp, "x"});
  const DType dtype = float_dtype(x, {kOp, "x"});
  EFFKERN_CHECK_VALUE(x.dim() >= 1, kOp, ": x must be [..., Ci], got a scalar");
  EFFKERN_CHECK_VALUE(codes.dim() >= 1, kOp, ": codes must be [Co, J] or [Co, J, m], got a scalar");
  const int64_t c_in = x.size(x.dim() - 1), c_out = codes.size(0);
  const CodedTensor coded(codes, codebook, c_in, kOp);
  const conv::Act activate = act_from_name(act, kOp);
  const FloatVector factor(scale, c_out, x.scalar_type(), {kOp, "scale"}, /*finite=*/true);
  const FloatVector addend(bias, c_out, x.scalar_type(), {kOp, "bias"});

  std::vector<int64_t> size;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) size.push_back(x.size(i));
  size.push_back(c_out);
  Tensor y = torch::stable::empty({size.data(), size.size()}, x.scalar_type(), std::nullopt, x.device());
  conv::Problem problem;
  problem.c_in = c_in;
  problem.c_out = c_out;
  problem.y.h = problem.y.w = 1;
  const Algo how = algorithm(algo, problem, coded.matrix(), kOp);
  if (algo == "direct") problem.algo = conv::Algo::Direct;
  if (y.numel() == 0) {
    coded.check_all_codes(kOp);
    return y;
  }
  const int64_t rows = y.numel() / c_out;
  const int64_t in_shape[] = {rows, c_in}, out_shape[] = {rows, c_out};
  const Tensor in = x.dim() == 2 ? x : torch::stable::reshape(x, {in_shape, 2});
  const Tensor out = torch::stable::view(y, {out_shape, 2});
  problem.x = matrix_of(in, dtype, c_in);
  problem.y = matrix_of(out, dtype, c_out);
  run_layer(problem, coded, factor.data(), addend.data(), activate, how, kOp);
  return y;
}

Tensor pq_decode(const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale) {
  constexpr const char* kOp = "pq_decode";
  const CodedTensor coded(codes, codebook, -1, kOp);
  const CodedMatrix& m = coded.matrix();
  const FloatVector factor(scale, m.rows, codebook.scalar_type(), {kOp, "scale"}, /*finite=*/true);
  const DType dtype = float_dtype(codebook, {kOp, "codebook"});
  const int64_t width = m.width(), shape[] = {m.rows, width};
  Tensor y = torch::stable::empty({shape, 2}, codebook.scalar_type(), std::nullopt, codebook.device());
  void* to = y.mutable_data_ptr();
  parallel_for(0, m.rows, 1 + 16384 / width, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(width));
    for (int64_t r = begin; r < end; ++r) {
      coded.decoder().row(r, row.data());
      const float s = factor ? factor.data()[r] : 1.0f;
      for (int64_t t = 0; t < width; ++t) store_float(to, dtype, r * width + t, row[t] * s);
    }
  });
  coded.check_codes(kOp);
  return y;
}

}  // namespace
}  // namespace effkern::pq

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("pq_conv2d", TORCH_BOX(&effkern::pq::pq_conv2d));
  m.impl("pq_linear", TORCH_BOX(&effkern::pq::pq_linear));
  m.impl("pq_decode", TORCH_BOX(&effkern::pq::pq_decode));
}
