// Block skipping on CUDA: the mask becomes a list of rows on the device; the first convolution reads the kept samples
// through it into a compact buffer, the last one adds the shortcut, writes the samples where they belong, and its idle
// blocks copy the shortcut of the dropped ones. What lies between the convolutions has x's dtype (fp32 on the CPU).
#include <string>
#include <tuple>
#include <vector>

#include "block_cuda.h"
#include "compact.h"
#include "stage_gpu.h"

namespace effkern::block_skip {

bool is_soft(const Tensor& keep) {
  return keep.scalar_type() != ScalarType::Bool && keep.scalar_type() != ScalarType::Byte;
}

void check_keep(const Tensor& keep, const Tensor& x, Arg arg) {
  device::check_here(keep, x, arg);
  const ScalarType type = keep.scalar_type();
  EFFKERN_CHECK_TYPE(type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Float ||
                         type == ScalarType::BFloat16 || type == ScalarType::Half,
                     arg.op, ": ", arg.name, " must be bool, uint8, float32, bfloat16 or float16, got ",
                     torch::headeronly::toString(type));
  for (int64_t i = 0; i < keep.dim(); ++i)
    EFFKERN_CHECK_VALUE(keep.size(i) < kLimit, arg.op, ": ", arg.name, " must have fewer than 2^31 rows and columns");
}

void sort(const device::Scope& scope, const Tensor& keep, Tensor& idx, Tensor& count, bool rest) {
  const bool many = keep.dim() == 2;
  run({.keep = scope.of<const char>(keep),
       .size = static_cast<int>(keep.element_size()),
       .signed_entries = is_soft(keep),
       .n = keep.size(0),
       .columns = many ? keep.size(1) : 1,
       .row_stride = keep.stride(0),
       .column_stride = many ? keep.stride(1) : 0,
       .idx = scope.of<int32_t>(idx),
       .count = scope.of<int32_t>(count),
       .rest = rest},
      scope.stream());
}

std::vector<Conv> convs_of(const Arguments& a, size_t first) {
  std::vector<Conv> convs;
  const ScalarType dtype = a.x.scalar_type();
  const bool basic = a.weights.size() == 2;
  int64_t c_in = a.x.size(1);
  for (size_t i = 0; i < a.weights.size(); ++i) {
    const std::string number = std::to_string(first + i + 1), w = "w" + number, b = "b" + number;
    const Tensor& weight = a.weights[i];
    EFFKERN_CHECK_VALUE(!PackedWeight::is_handle(weight), a.op, ": ", w,
                        " must be a 4-d weight on the GPU, handles are the CPU engine's layout");
    device::check_here(weight, a.x, {a.op, w.c_str()});
    const PackedWeight::Dims dims = weight_dims(weight, 1, {a.op, w.c_str()}, &dtype);
    const int64_t side = basic || i == 1 ? 3 : 1, stride = i == (basic ? 0u : 1u) ? a.stride : 1;
    EFFKERN_CHECK_VALUE(dims.in_per_group == c_in && dims.kh == side && dims.kw == side, a.op, ": ", w,
                        " must be [Co, ", c_in, ", ", side, ", ", side, "], got shape ", shape_text(weight));
    convs.push_back({device::taps(weight),
                     device::vector(a.biases[i], dims.out_channels, true, dtype, a.x, {a.op, b.c_str()}),
                     dims,
                     {{stride, stride}, {side / 2, side / 2}, {1, 1}}});
    c_in = dims.out_channels;
  }
  return convs;
}

Tensor dense(const Tensor& map) {
  const int64_t c = map.size(1), w = map.size(3), h = map.size(2);
  const bool is =
      (c <= 1 || map.stride(1) == 1) && (w <= 1 || map.stride(3) == c) && (h <= 1 || map.stride(2) == w * c);
  return is ? map : torch::stable::contiguous(map, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor skip_block(const Arguments& a) {
  const char* op = a.op;
  const Tensor& x = a.x;
  const device::Scope scope(x, {op, "x"});
  Tensor in = device::pixels(x, x, {op, "x"});
  const int64_t n = x.size(0), c = x.size(1);
  const conv::Act act = act_from_name(a.act, op);
  check_algo(a.algo, op);
  check_keep(a.keep, x, {op, "keep"});
  EFFKERN_CHECK_VALUE(a.keep.dim() == 1 && a.keep.size(0) == n, op, ": keep must be [", n, "], got shape ",
                      shape_text(a.keep));
  EFFKERN_CHECK_VALUE(a.stride >= 1 && a.stride < kLimit, op, ": stride must be at least 1, got ", a.stride);
  const std::vector<Conv> convs = convs_of(a);
  const int64_t c_out = convs.back().dims.out_channels;
  const int64_t h = conv::out_size(x.size(2), 1, a.stride, 0, 1), w = conv::out_size(x.size(3), 1, a.stride, 0, 1);
  if (a.res.has_value()) {
    device::pixels(*a.res, x, {op, "res"});
    EFFKERN_CHECK_TYPE(a.res->scalar_type() == x.scalar_type(), op, ": res must have x's dtype");
    EFFKERN_CHECK_VALUE(a.res->size(0) == n && a.res->size(1) == c_out && a.res->size(2) == h && a.res->size(3) == w,
                        op, ": res must be [", n, ", ", c_out, ", ", h, ", ", w, "], got ", shape_text(*a.res));
  } else {
    EFFKERN_CHECK_VALUE(a.stride == 1 && c_out == c, op, ": res must be given for stride ", a.stride, " and ", c,
                        " to ", c_out, " channels; x does not fit as the shortcut");
    in = dense(in);
  }
  const Tensor shortcut = a.res.has_value() ? dense(device::pixels(*a.res, x, {op, "res"})) : in;
  EFFKERN_CHECK_VALUE(c_out * h * w < kLimit, op, ": a sample of the output must have fewer than 2^31 elements");
  device::Output y(x, c_out, h, w);
  if (y.pixels().numel() == 0) return y.finish();

  Tensor rows = device::empty_ints(n, x), count = device::empty_ints(1, x);
  sort(scope, a.keep, rows, count, /*rest=*/true);
  Tensor from = in;
  for (size_t i = 0; i < convs.size(); ++i) {
    const Conv& conv = convs[i];
    const bool last = i + 1 == convs.size();
    conv::gpu::Question q{.op = op,
                          .x = from,
                          .weight = conv.weight,
                          .y = y.pixels(),
                          .dims = conv.dims,
                          .part = {1, conv.dims.out_channels, conv.dims.in_per_group},
                          .geometry = conv.geometry,
                          .act = act,
                          .bias = conv.bias,
                          .samples = n,
                          .count = count};
    if (i == 0) q.x_rows = rows;
    if (last) {
      q.residual = shortcut, q.residual_rows = rows, q.y_rows = rows, q.copied = n;
      if (is_soft(a.keep)) q.gate = torch::stable::contiguous(torch::stable::to(a.keep, ScalarType::Float));
    } else {
      const int64_t co = conv.dims.out_channels;
      const int64_t hi = conv::out_size(from.size(2), 1, conv.geometry.stride[0], 0, 1);
      const int64_t wi = conv::out_size(from.size(3), 1, conv.geometry.stride[1], 0, 1);
      q.y = device::empty({{n, co, hi, wi}, {hi * wi * co, 1, wi * co, co}}, x.scalar_type(), x);
    }
    conv::gpu::run(scope, q);
    from = q.y;
  }
  return y.finish();
}

namespace {

Tensor skip_basic_block(const Tensor& x, const Tensor& keep, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                        const Tensor& b2, int64_t stride, const MaybeTensor& res, Text act, Text algo) {
  return skip_block({"skip_basic_block", x, keep, {w1, w2}, {b1, b2}, stride, res, act, algo});
}

Tensor skip_bottleneck(const Tensor& x, const Tensor& keep, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                       const Tensor& b2, const Tensor& w3, const Tensor& b3, int64_t stride, const MaybeTensor& res,
                       Text act, Text algo) {
  return skip_block({"skip_bottleneck", x, keep, {w1, w2, w3}, {b1, b2, b3}, stride, res, act, algo});
}

template <class T>
Stage<T> stage_of(const device::Scope& scope, const Tensor& x, const Tensor& y, const Tensor& keep, bool soft,
                  const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, int64_t first,
                  int64_t blocks) {
  const auto aligned = [](const T* p, const conv::gpu::Strides& s) {
    constexpr int64_t kPer = 16 / sizeof(T);
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && s.n % kPer == 0 && s.h % kPer == 0 && s.w % kPer == 0;
  };
  Stage<T> p{};
  p.x = scope.of<const T>(x), p.xs = {x.stride(0), x.stride(2), x.stride(3)};
  p.y = scope.of<T>(y), p.ys = {y.stride(0), y.stride(2), y.stride(3)};
  p.wide_x = aligned(p.x.p, p.xs), p.wide_y = aligned(p.y.p, p.ys);
  p.samples = static_cast<int32_t>(x.size(0)), p.channels = static_cast<int32_t>(x.size(1));
  p.h = static_cast<int32_t>(x.size(2)), p.w = static_cast<int32_t>(x.size(3));
  p.blocks = static_cast<int32_t>(blocks);
  p.keep = scope.of<const float>(keep) + first, p.keep_row = keep.size(1);
  p.soft = soft;
  for (int64_t i = 0; i < 2 * blocks; ++i) {
    p.weight[i] = scope.of<const T>(weights[static_cast<size_t>(2 * first + i)]);
    p.bias[i] = scope.of<const float>(biases[static_cast<size_t>(2 * first + i)]);
  }
  return p;
}

// As the stage's kernel reads it: [out][tap][in] without gaps, 16-byte aligned.
Tensor in_a_row(const Tensor& weight) {
  const int64_t c = weight.size(1);
  const bool is = weight.stride(0) == 9 * c && weight.stride(1) == 1 && weight.stride(2) == 3 * c &&
                  weight.stride(3) == c && reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0;
  return is ? weight
            : torch::stable::clone(torch::stable::contiguous(weight, torch::headeronly::MemoryFormat::ChannelsLast));
}

// A stage of CIFAR's size: the map of a sample stays in shared memory through all blocks. Elsewhere a stage is its
// blocks, one after the other, with the same results.
Tensor skip_stage(const Tensor& x, const Tensor& keep, std::vector<Tensor> weights, std::vector<Tensor> biases,
                  Text kind, Text act, Text algo) {
  constexpr const char* op = "skip_stage";
  const device::Scope scope(x, {op, "x"});
  Tensor in = device::pixels(x, x, {op, "x"});
  EFFKERN_CHECK_VALUE(kind == "basic" || kind == "bottleneck", op, ": kind must be basic or bottleneck, got '", kind,
                      "'");
  const conv::Act activate = act_from_name(act, op);
  check_algo(algo, op);
  check_keep(keep, x, {op, "keep"});
  const int64_t n = x.size(0), c = x.size(1);
  EFFKERN_CHECK_VALUE(keep.dim() == 2 && keep.size(0) == n, op, ": keep must be [", n, ", B], got shape ",
                      shape_text(keep));
  const int64_t blocks = keep.size(1);
  const size_t convs = kind == "basic" ? 2 : 3, tensors = convs * static_cast<size_t>(blocks);
  EFFKERN_CHECK_VALUE(weights.size() == biases.size(), op, ": weights and biases must have as many tensors, got ",
                      weights.size(), " and ", biases.size());
  EFFKERN_CHECK_VALUE(weights.size() == tensors, op, ": weights and biases must have ", tensors, " tensors for ",
                      blocks, " ", kind, " blocks, got ", weights.size());
  bool square = kind == "basic";
  const MaybeTensor none;
  std::vector<Conv> all;
  for (size_t b = 0; b < static_cast<size_t>(blocks); ++b) {
    const Arguments block{op,
                          x,
                          keep,
                          {&weights[b * convs], &weights[b * convs] + convs},
                          {&biases[b * convs], &biases[b * convs] + convs},
                          1,
                          none,
                          act,
                          algo};
    for (Conv& conv : convs_of(block, b * convs)) {
      square = square && conv.dims.out_channels == c;
      all.push_back(std::move(conv));
    }
    EFFKERN_CHECK_VALUE(all.back().dims.out_channels == c, op, ": block ", b, " must keep x's ", c, " channels, got ",
                        all.back().dims.out_channels);
  }
  const ScalarType dtype = x.scalar_type();
  float low = 0, high = 0;
  const bool fits = square && clips(static_cast<Act>(activate), low, high) &&
                    stage_fits(c, static_cast<int32_t>(x.element_size()), x.size(2), x.size(3), most_stage_shared());
  if (!fits && blocks > 0) {
    Tensor state = x;
    for (size_t b = 0; b < static_cast<size_t>(blocks); ++b)
      state = skip_block({op,
                          state,
                          torch::stable::select(keep, 1, static_cast<int64_t>(b)),
                          {&weights[b * convs], &weights[b * convs] + convs},
                          {&biases[b * convs], &biases[b * convs] + convs},
                          1,
                          none,
                          act,
                          algo});
    return state;
  }
  device::Output y(x, c, x.size(2), x.size(3));
  if (y.pixels().numel() == 0) return y.finish();
  if (blocks == 0) torch::stable::copy_(y.pixels(), x);
  const Tensor mask = torch::stable::contiguous(torch::stable::to(keep, ScalarType::Float));
  std::vector<Tensor> dense, vectors;
  for (const Conv& conv : all) dense.push_back(in_a_row(conv.weight)), vectors.push_back(*conv.bias);
  for (int64_t first = 0; first < blocks; first += kStageBlocks) {
    const int64_t count = std::min<int64_t>(kStageBlocks, blocks - first);
    device::in_type(dtype, [&]<class T>(T) {
      Stage<T> p = stage_of<T>(scope, in, y.pixels(), mask, is_soft(keep), dense, vectors, first, count);
      p.low = low, p.high = high;
      if constexpr (std::is_same_v<T, float>)
        run(p, conv::gpu::tf32() ? Math::TF32 : Math::F32, scope.stream());
      else
        run(p, scope.stream());
    });
    in = y.pixels();
  }
  return y.finish();
}

// Unlike on the CPU the entries are not checked to be in [0, 1]: everything that is not zero is kept.
std::tuple<Tensor, Tensor> compact(const Tensor& keep) {
  EFFKERN_CHECK_VALUE(keep.dim() == 1 || keep.dim() == 2, "compact: keep must be [N] or [N, B], got shape ",
                      shape_text(keep));
  const device::Scope scope(keep, {"compact", "keep"});
  check_keep(keep, keep, {"compact", "keep"});
  const bool many = keep.dim() == 2;
  const int64_t shape[] = {many ? keep.size(1) : 1, keep.size(0)};
  Tensor idx =
      torch::stable::empty({many ? shape : shape + 1, many ? 2u : 1u}, ScalarType::Int, std::nullopt, keep.device());
  Tensor count = torch::stable::empty({shape, many ? 1u : 0u}, ScalarType::Int, std::nullopt, keep.device());
  sort(scope, keep, idx, count, /*rest=*/false);
  return {idx, count};
}

}  // namespace
}  // namespace effkern::block_skip

EFFKERN_CUDA_OPS(m) {
  m.impl("skip_basic_block", TORCH_BOX(&effkern::block_skip::skip_basic_block));
  m.impl("skip_bottleneck", TORCH_BOX(&effkern::block_skip::skip_bottleneck));
  m.impl("skip_stage", TORCH_BOX(&effkern::block_skip::skip_stage));
  m.impl("compact", TORCH_BOX(&effkern::block_skip::compact));
}
