// Gradients of coded layers and tables on CUDA. A layer's weight is decoded once for the gradient in x; that in the
// weight is made whole in fp32 and added up by code. Nothing waits for the host, and no sum depends on luck.
#include <string>
#include <tuple>
#include <vector>

#include "../conv_backward/gradients_cuda.h"
#include "book_grad.h"
#include "codes_cuda.h"
#include "decode_gpu.h"

namespace effkern::pq {
namespace {

using Grads = std::tuple<Tensor, Tensor, Tensor>;

Tensor as(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

Tensor flat(int64_t size, ScalarType type, const Tensor& like) {
  return torch::stable::empty({&size, 1}, type, std::nullopt, like.device());
}

template <class T>
CodedRows<T> rows_of(const device::Scope& scope, const Coded& table, const Tensor& values, const MaybeTensor& scale) {
  CodedRows<T> of{};
  of.codes = table.as_codes(scope);
  of.coded = static_cast<int32_t>(table.rows), of.positions = static_cast<int32_t>(table.positions);
  of.stages = static_cast<int32_t>(table.stages), of.d = static_cast<int32_t>(table.d);
  of.book_per_position = table.book_per_position, of.book_per_stage = table.book_per_stage;
  of.rows = of.value_rows = static_cast<int32_t>(values.size(0));
  of.padding = -1;
  of.values = scope.of<const T>(values);
  of.pitch = values.stride(0), of.columns = static_cast<int32_t>(values.size(1));
  if (scale) of.scale = scope.of<const float>(*scale);
  return of;
}

// The sums of `of` by code, into a dense tensor of as many books of as many entries.
template <class T>
void add_by_code(const device::Scope& scope, const CodedRows<T>& of, Tensor& to) {
  BookGrad<T> p{};
  p.of = of;
  set_slices(p);
  const int64_t size = int64_t{p.books} * of.codes.entries * of.d;
  const Tensor parts = flat(size * p.slices, ScalarType::Float, to);
  p.parts = scope.of<float>(parts);
  run(p, scope.stream());
  device::in_type(to.scalar_type(),
                  [&]<class U>(U) { run(BookFold<U>{p.parts, scope.of<U>(to), size, p.slices}, scope.stream()); });
}

// Uninitialised, dense, like `t`; empty where it is not wanted.
Tensor like(const Tensor& t, bool wanted) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  if (!wanted) sizes.assign(1, 0);
  return torch::stable::empty({sizes.data(), sizes.size()}, t.scalar_type(), std::nullopt, t.device());
}

Grads pq_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& codes, const Tensor& codebook,
                         const MaybeTensor& scale, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                         std::vector<bool> needs) {
  constexpr const char* op = "pq_conv2d_backward";
  const device::Scope scope(x, {op, "x"});
  const ScalarType dtype = x.scalar_type();
  conv::gpu::Convolution c{};
  c.op = op;
  c.x = device::pixels(x, x, {op, "x"});
  EFFKERN_CHECK_VALUE(needs.size() == 3, op, ": needs must have 3 values, got ", needs.size());
  EFFKERN_CHECK_VALUE(
      kernel_size.size() == 2 && kernel_size[0] >= 1 && kernel_size[1] >= 1 && kernel_size[0] * kernel_size[1] < kLimit,
      op, ": kernel_size must be 2 positive values");
  EFFKERN_CHECK_VALUE(codes.dim() >= 1 && groups >= 1 && x.size(1) % groups == 0 && codes.size(0) % groups == 0, op,
                      ": groups must divide x's channels and the rows of codes, got ", groups);
  const int64_t kh = kernel_size[0], kw = kernel_size[1], rows = codes.size(0), channels = x.size(1) / groups;
  c.geometry = geometry(stride, padding, dilation, op);
  int64_t map[2];
  output_map(x, kh, kw, c.geometry, op, map);
  EFFKERN_CHECK_VALUE(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == rows && grad.size(2) == map[0] &&
                          grad.size(3) == map[1],
                      op, ": grad must be [", x.size(0), ", ", rows, ", ", map[0], ", ", map[1], "], got shape ",
                      shape_text(grad));
  Coded table = coded(codes, codebook, channels * kh * kw, x, op);
  const MaybeTensor factor = device::vector(scale, rows, true, dtype, x, {op, "scale"});
  c.gz = device::pixels(as(grad, dtype), x, {op, "grad"});
  c.dims = {rows, channels, kh, kw, groups}, c.part = {groups, rows / groups, channels};

  std::optional<device::Output> gx;
  if (needs[0]) gx.emplace(x, x.size(1), x.size(2), x.size(3));
  Tensor g_book = like(codebook, needs[1]), g_scale = flat(needs[2] ? rows : 0, ScalarType::Float, x);
  if (grad.numel() == 0 || x.numel() == 0) {
    if (gx) torch::stable::zero_(gx->pixels());
    torch::stable::zero_(g_book), torch::stable::zero_(g_scale);
  } else {
    if (gx) {
      Coded rounded = table;
      rounded.book = as(table.book, dtype);
      c.weight = device::empty({{rows, channels, kh, kw}, {channels * kh * kw, 1, kw * channels, channels}}, dtype, x);
      decode_into(scope, rounded, factor, kh * kw, channels, c.weight);
      conv::gpu::input_gradient(scope, c, gx->pixels());
    }
    if (needs[1] || needs[2]) {
      const int64_t shape[] = {rows, channels, kh, kw}, matrix[] = {rows, channels * kh * kw};
      Tensor gw = torch::stable::empty({shape, 4}, ScalarType::Float, std::nullopt, x.device());
      conv::gpu::weight_gradient(scope, c, gw);
      const CodedRows<float> of = rows_of<float>(scope, table, torch::stable::view(gw, {matrix, 2}), factor);
      if (needs[1]) add_by_code(scope, of, g_book);
      const Tensor book = as(table.book, ScalarType::Float);
      if (needs[2]) run(RowDots<float>{of, scope.of<const float>(book), scope.of<float>(g_scale), {}}, scope.stream());
    }
  }
  return {gx ? gx->finish() : flat(0, dtype, x), g_book,
          as(g_scale, scale ? scale->scalar_type() : codebook.scalar_type())};
}

device::Indices list(const device::Scope& scope, const Tensor& t, int64_t size, const Tensor& x, Arg arg) {
  device::check_here(t, x, arg);
  const bool wide = t.scalar_type() == ScalarType::Long;
  EFFKERN_CHECK_TYPE(wide || t.scalar_type() == ScalarType::Int, arg.op, ": ", arg.name, " must be int64 or int32");
  EFFKERN_CHECK_VALUE(t.dim() == 1 && t.size(0) == size && size < kLimit, arg.op, ": ", arg.name, " must have shape [",
                      size, "], got ", shape_text(t));
  return {scope.of<const int32_t>(t), t.stride(0) * (wide ? 2 : 1), wide};
}

Grads pq_embedding_backward(const Tensor& grad, const Tensor& idx, const MaybeTensor& bags, const MaybeTensor& weights,
                            const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale,
                            std::optional<int64_t> padding_idx, std::vector<bool> needs) {
  constexpr const char* op = "pq_embedding_backward";
  const device::Scope scope(codebook, {op, "codebook"});
  const Tensor& x = codebook;
  const Coded table = coded(codes, codebook, -1, x, op);
  EFFKERN_CHECK_VALUE(needs.size() == 3, op, ": needs must have 3 values, got ", needs.size());
  EFFKERN_CHECK_VALUE(!padding_idx || (*padding_idx >= 0 && *padding_idx < table.rows), op,
                      ": padding_idx must be in [0, ", table.rows, "), got ", padding_idx.value_or(0));
  device::check_here(grad, x, {op, "grad"});
  float_dtype(grad, {op, "grad"});
  const int64_t n = idx.numel(), width = table.positions * table.d;
  EFFKERN_CHECK_VALUE(grad.dim() == 2 && grad.size(1) == width && grad.size(0) < kLimit && (bags || grad.size(0) == n),
                      op, ": grad must be [", n, ", ", width, "], got shape ", shape_text(grad));
  const device::Indices picked = list(scope, idx, n, x, {op, "idx"});
  const device::Indices of_bags = bags ? list(scope, *bags, n, x, {op, "bags"}) : device::Indices{};
  const ScalarType dtype = codebook.scalar_type();
  const MaybeTensor factor = device::vector(scale, table.rows, true, dtype, x, {op, "scale"}),
                    weight = device::vector(weights, n, true, dtype, x, {op, "weights"});
  EFFKERN_CHECK_INDEX(table.rows > 0 || n == 0, op, ": idx must be empty for a table without rows");
  Tensor g_book = like(codebook, needs[0]), g_scale = flat(needs[1] ? table.rows : 0, ScalarType::Float, x),
         g_weights = flat(needs[2] ? n : 0, ScalarType::Float, x);
  if (n == 0 || grad.size(0) == 0) {
    for (Tensor* t : {&g_book, &g_scale, &g_weights}) torch::stable::zero_(*t);
  } else {
    const Tensor values = grad.stride(1) == 1 ? grad : torch::stable::contiguous(grad);
    const Tensor book = as(table.book, ScalarType::Float), dots = flat(needs[1] ? n : 0, ScalarType::Float, x);
    device::in_type(values.scalar_type(), [&]<class T>(T) {
      CodedRows<T> of = rows_of<T>(scope, table, values, factor);
      of.rows = static_cast<int32_t>(n);
      of.picked = picked, of.bags = of_bags;
      of.padding = static_cast<int32_t>(padding_idx.value_or(-1));
      if (weight) of.weights = scope.of<const float>(*weight);
      if (needs[0]) add_by_code(scope, of, g_book);
      RowDots<T> p{of, scope.of<const float>(book), {}, {}};
      if (needs[1]) p.by_scale = scope.of<float>(dots);
      if (needs[2]) p.by_weight = scope.of<float>(g_weights);
      if (needs[1] || needs[2]) run(p, scope.stream());
    });
    if (needs[1]) {  // the rows of the table are the entries of one book of single numbers
      const Tensor names = torch::stable::contiguous(as(idx, ScalarType::Int));
      const Coded each{names, dots, n, 1, 1, table.rows, 1, false, false};
      const int64_t column[] = {n, 1};
      add_by_code(scope, rows_of<float>(scope, each, torch::stable::view(dots, {column, 2}), {}), g_scale);
    }
  }
  return {g_book, as(g_scale, scale ? scale->scalar_type() : dtype),
          as(g_weights, weights ? weights->scalar_type() : dtype)};
}

}  // namespace
}  // namespace effkern::pq

EFFKERN_CUDA_OPS(m) {
  m.impl("pq_conv2d_backward", TORCH_BOX(&effkern::pq::pq_conv2d_backward));
  m.impl("pq_embedding_backward", TORCH_BOX(&effkern::pq::pq_embedding_backward));
}
