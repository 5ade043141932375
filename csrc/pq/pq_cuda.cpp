// pq_decode, pq_linear and pq_conv2d on CUDA. A linear layer of few rows (up to 64 in 16 bits, 8 in fp32) is one launch
// that reads codes alone and multiplies the entries they name. All else decodes the weight, in x's dtype, into memory
// of this call and runs the convolution on it in the same stream: docs/gpu.md says what that costs.
#include <string>
#include <vector>

#include "../conv/conv_op.h"
#include "codes_cuda.h"
#include "decode_gpu.h"
#include "dots_mma_gpu.h"

namespace effkern::pq {

void decode_into(const device::Scope& scope, const Coded& weight, const MaybeTensor& scale, int64_t taps,
                 int64_t channels, const Tensor& y) {
  device::in_type(y.scalar_type(), [&]<class T>(T) {
    Decoding<T> p{};
    p.codes = weight.as_codes(scope);
    p.book = scope.of<const T>(weight.book);
    if (scale) p.scale = scope.of<const float>(*scale);
    p.y = scope.of<T>(y);
    p.rows = static_cast<int32_t>(weight.rows), p.positions = static_cast<int32_t>(weight.positions);
    p.stages = static_cast<int32_t>(weight.stages), p.d = static_cast<int32_t>(weight.d);
    p.taps = static_cast<int32_t>(taps), p.channels = static_cast<int32_t>(channels);
    p.book_per_position = weight.book_per_position, p.book_per_stage = weight.book_per_stage;
    run(p, scope.stream());
  });
}

namespace {

Tensor pq_decode(const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale) {
  constexpr const char* op = "pq_decode";
  const device::Scope scope(codebook, {op, "codebook"});
  const Coded weight = coded(codes, codebook, -1, codebook, op);
  const ScalarType dtype = codebook.scalar_type();
  const MaybeTensor factor = device::vector(scale, weight.rows, true, dtype, codebook, {op, "scale"});
  const int64_t shape[] = {weight.rows, weight.positions * weight.d};
  Tensor y = torch::stable::empty({shape, 2}, dtype, std::nullopt, codebook.device());
  decode_into(scope, weight, factor, 1, shape[1], y);
  return y;
}

// What pq_linear and pq_conv2d share.
struct Layer {
  const char* op;
  const Tensor& x;
  Coded weight;  // the book in x's dtype
  MaybeTensor scale, bias;
  conv::Act act;

  Layer(const char* op, const Tensor& x, const Tensor& codes, const Tensor& codebook, int64_t columns,
        const MaybeTensor& scale, const MaybeTensor& bias, const std::string& act)
      : op(op), x(x), weight(coded(codes, codebook, columns, x, op)), act(act_from_name(act, op)) {
    const ScalarType dtype = x.scalar_type();
    weight.book = torch::stable::to(weight.book, dtype);
    this->scale = device::vector(scale, weight.rows, true, dtype, x, {op, "scale"});
    this->bias = device::vector(bias, weight.rows, true, dtype, x, {op, "bias"});
  }

  // Names and forms as on the CPU, so that what runs there runs here; only decode_fma has a kernel of its own.
  void check_algo(const std::string& algo, bool pointwise) const {
    constexpr int64_t kTableEntries = 256;
    EFFKERN_CHECK_VALUE(algo == "auto" || algo == "panel" || algo == "direct" || algo == "decode_fma" || algo == "lut",
                        op, ": algo must be auto, decode_fma, panel, lut or direct, got '", algo, "'");
    if (algo != "decode_fma" && algo != "lut") return;
    EFFKERN_CHECK_VALUE(pointwise, op,
                        ": algo must be auto, panel or direct but for a 1x1 kernel without padding and groups, got '",
                        algo, "'");
    EFFKERN_CHECK_VALUE(algo != "lut" || (weight.stages == 1 && weight.entries <= kTableEntries), op,
                        ": algo must not be lut for codes of more than one stage or codebooks of more than ",
                        kTableEntries, " entries, got ", weight.stages, " and ", weight.entries);
  }

  // Decodes the weight and runs the convolution. in, y: channels side by side.
  void convolve(const device::Scope& scope, const Tensor& in, const Tensor& y, int64_t kh, int64_t kw,
                const Geometry& geometry, int64_t groups) const {
    const int64_t channels = in.size(1) / groups, rows = weight.rows;
    const Tensor dense =
        device::empty({{rows, channels, kh, kw}, {channels * kh * kw, 1, kw * channels, channels}}, x.scalar_type(), x);
    decode_into(scope, weight, {}, kh * kw, channels, dense);
    conv::gpu::run(scope, {.op = op,
                           .x = in,
                           .weight = dense,
                           .y = y,
                           .dims = {rows, channels, kh, kw, groups},
                           .part = {groups, rows / groups, channels},
                           .geometry = geometry,
                           .act = act,
                           .scale = scale,
                           .shift = bias,
                           .samples = in.size(0)});
  }

  // Rows up to which decoding them anew costs less than the dense weight's way through memory.
  int64_t few() const { return x.scalar_type() == ScalarType::Float ? kDotsRows : kMmaRows; }

  // False where the kernel for few rows cannot run. in: [rows, columns], numbers side by side; y: dense.
  bool ran_dots(const device::Scope& scope, const Tensor& in, const Tensor& y) const {
    if (weight.stages > 1 || weight.book_per_position || in.size(1) != weight.positions * weight.d) return false;
    bool ran = false;
    device::in_type(x.scalar_type(), [&]<class T>(T) {
      Dots<T> p{};
      p.codes = weight.as_codes(scope);
      p.book = scope.of<const T>(weight.book);
      p.x = scope.of<const T>(in), p.x_row = in.stride(0);
      if (scale) p.scale = scope.of<const float>(*scale);
      if (bias) p.bias = scope.of<const float>(*bias);
      p.y = scope.of<T>(y);
      p.rows = static_cast<int32_t>(in.size(0)), p.outputs = static_cast<int32_t>(weight.rows);
      p.positions = static_cast<int32_t>(weight.positions), p.d = static_cast<int32_t>(weight.d);
      p.act = static_cast<conv::gpu::Act>(act);
      ran = plan(p);
      if (ran) run(p, scope.stream());
    });
    return ran;
  }
};

Tensor pq_conv2d(const Tensor& x, const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale,
                 const MaybeTensor& bias, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, Text act, Text algo) {
  constexpr const char* op = "pq_conv2d";
  const device::Scope scope(x, {op, "x"});
  const Tensor in = device::pixels(x, x, {op, "x"});
  EFFKERN_CHECK_VALUE(kernel_size.size() == 2, op, ": kernel_size must have 2 values, got ", kernel_size.size());
  const int64_t kh = kernel_size[0], kw = kernel_size[1];
  const Geometry g = geometry(stride, padding, dilation, op);
  int64_t map[2];
  output_map(x, kh, kw, g, op, map);
  EFFKERN_CHECK_VALUE(codes.dim() >= 1, op, ": codes must be [Co, J] or [Co, J, m], got a scalar");
  const int64_t c_out = codes.size(0);
  EFFKERN_CHECK_VALUE(groups >= 1 && x.size(1) % groups == 0 && c_out % groups == 0, op, ": groups must divide x's ",
                      x.size(1), " channels and the ", c_out, " rows of codes, got ", groups);
  EFFKERN_CHECK_VALUE(kh * kw < kLimit, op, ": kernel_size must be smaller, got (", kh, ", ", kw, ")");
  const Layer layer(op, x, codes, codebook, x.size(1) / groups * kh * kw, scale, bias, act);
  layer.check_algo(algo, kh == 1 && kw == 1 && g.pad[0] == 0 && g.pad[1] == 0 && groups == 1);
  device::Output y(x, c_out, map[0], map[1]);
  if (y.pixels().numel() > 0) layer.convolve(scope, in, y.pixels(), kh, kw, g, groups);
  return y.finish();
}

Tensor pq_linear(const Tensor& x, const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale,
                 const MaybeTensor& bias, Text act, Text algo) {
  constexpr const char* op = "pq_linear";
  const device::Scope scope(x, {op, "x"});
  device::check_here(x, x, {op, "x"});
  float_dtype(x, {op, "x"});
  EFFKERN_CHECK_VALUE(x.dim() >= 1, op, ": x must be [..., Ci], got a scalar");
  EFFKERN_CHECK_VALUE(codes.dim() >= 1, op, ": codes must be [Co, J] or [Co, J, m], got a scalar");
  const int64_t c_in = x.size(x.dim() - 1), c_out = codes.size(0);
  const Layer layer(op, x, codes, codebook, c_in, scale, bias, act);
  layer.check_algo(algo, true);
  std::vector<int64_t> size;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) size.push_back(x.size(i));
  size.push_back(c_out);
  Tensor y = torch::stable::empty({size.data(), size.size()}, x.scalar_type(), std::nullopt, x.device());
  if (y.numel() == 0) return y;
  const int64_t rows = y.numel() / c_out;
  EFFKERN_CHECK_VALUE(rows < kLimit && c_in < kLimit, op, ": x must have fewer than 2^31 rows and columns, got shape ",
                      shape_text(x));
  const int64_t in_shape[] = {rows, c_in}, out_shape[] = {rows, c_out};
  Tensor in = x.dim() == 2 ? x : torch::stable::reshape(x, {in_shape, 2});
  if (c_in > 1 && in.stride(1) != 1) in = torch::stable::contiguous(in);
  const Tensor out = torch::stable::view(y, {out_shape, 2});
  if ((algo == "decode_fma" || (algo == "auto" && rows <= layer.few())) && layer.ran_dots(scope, in, out)) return y;
  const int64_t in_map[] = {rows, c_in, 1, 1}, out_map[] = {rows, c_out, 1, 1};
  layer.convolve(scope, torch::stable::view(in, {in_map, 4}), torch::stable::view(out, {out_map, 4}), 1, 1,
                 {{1, 1}, {0, 0}, {1, 1}}, 1);
  return y;
}

}  // namespace
}  // namespace effkern::pq

EFFKERN_CUDA_OPS(m) {
  m.impl("pq_conv2d", TORCH_BOX(&effkern::pq::pq_conv2d));
  m.impl("pq_linear", TORCH_BOX(&effkern::pq::pq_linear));
  m.impl("pq_decode", TORCH_BOX(&effkern::pq::pq_decode));
}
