#include "block.h"

#include <algorithm>
#include <string>

#include "../common/parallel.h"

namespace effkern::block_skip {
namespace {

// Half of the 1 MiB of L2 that current cores have; the other half is for weights and row tables.
constexpr int64_t kCacheFloats = (512 << 10) / 4;

}  // namespace

Block::Block(const char* op, Kind kind, const View* weights, const View* biases, int64_t c_in, ScalarType dtype,
             int64_t stride, conv::Act act, conv::Algo algo, int64_t first)
    : stride_(stride), act_(act), algo_(algo) {
  EFFKERN_CHECK_VALUE(stride >= 1 && stride < (int64_t{1} << 31), op, ": stride must be at least 1, got ", stride);
  const size_t n = convs_of(kind);
  convs_.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const std::string w = "w" + std::to_string(first + static_cast<int64_t>(i));
    const std::string b = "b" + std::to_string(first + static_cast<int64_t>(i));
    const int64_t kernel = kind == Kind::Basic || i == 1 ? 3 : 1;
    const PackedWeight::Dims d = PackedWeight::dims(weights[i], 1, {op, w.c_str()}, &dtype);
    EFFKERN_CHECK_VALUE(d.kh == kernel && d.kw == kernel && d.in_per_group == c_in, op, ": ", w, " must be [Co, ", c_in,
                        ", ", kernel, ", ", kernel, "], got [", d.out_channels, ", ", d.in_per_group, ", ", d.kh, ", ",
                        d.kw, "]");
    FloatVector bias(biases[i], d.out_channels, dtype, {op, b.c_str()});
    PackedWeight packed(weights[i], d, {1, d.out_channels, d.in_per_group});
    EFFKERN_CHECK_VALUE(packed.bias() == nullptr, op, ": ", w, " was packed with a bias; pack it without, ", b,
                        " is given");
    const bool strided = kind == Kind::Basic ? i == 0 : i == 1;
    convs_.push_back({std::move(packed), std::move(bias), c_in, d.out_channels, strided ? stride : 1, kernel / 2});
    c_in = d.out_channels;
  }
}

int64_t Block::scratch_floats(int64_t h, int64_t w) const {
  int64_t total = 0;
  for (size_t i = 0; i + 1 < convs_.size(); ++i) {
    h = (h - 1) / convs_[i].stride + 1;
    w = (w - 1) / convs_[i].stride + 1;
    total += convs_[i].c_out * h * w;
  }
  return total;
}

int64_t Block::weight_floats() const {
  int64_t total = 0;
  for (const Conv& c : convs_) {
    const int64_t values = c.pad == 0 ? 1 : c.stride == 1 ? conv::kWinogradValues : 9;
    total += values * c.c_in * c.c_out;
  }
  return total;
}

void Block::run(const conv::Activation& x, const int64_t* x_rows, const conv::Activation& residual,
                const int64_t* residual_rows, const conv::Activation& y, const int64_t* y_rows, int64_t count,
                float* scratch, int64_t threads) const {
  conv::Activation in = x;
  for (size_t i = 0; i < convs_.size(); ++i) {
    const Conv& c = convs_[i];
    const bool last = i + 1 == convs_.size();
    const int64_t h = (in.h - 1) / c.stride + 1, w = (in.w - 1) / c.stride + 1;
    conv::Problem p;
    p.algo = algo_;
    p.x = in;
    p.x_rows = i == 0 ? x_rows : nullptr;
    p.y = last ? y : nhwc(scratch, count, c.c_out, h, w);
    p.y_rows = last ? y_rows : nullptr;
    p.count = count;
    p.c_in = c.c_in;
    p.c_out = c.c_out;
    c.weight.attach(p);
    p.stride[0] = p.stride[1] = c.stride;
    p.pad[0] = p.pad[1] = c.pad;
    p.epilogue.shift = c.bias.data();
    p.epilogue.act = act_;
    if (last) {
      p.epilogue.residual = &residual;
      p.epilogue.residual_rows = residual_rows;
    }
    conv::run(p, threads);
    in = p.y;
    scratch += count * c.c_out * h * w;
  }
}

Scratch::Scratch(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64 + 64;
  data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (data_ == nullptr) throw std::bad_alloc();
}

int64_t samples_at_a_time(int64_t floats_per_sample) {
  return std::max<int64_t>(1, kCacheFloats / std::max<int64_t>(1, floats_per_sample));
}

void run_block(const Block& block, const Decision& decision, const conv::Activation& x,
               const conv::Activation& residual, const conv::Activation& y, int64_t threads) {
  const int64_t kept = static_cast<int64_t>(decision.kept.size()), soft = static_cast<int64_t>(decision.soft.size());
  if (kept + soft == 0) return;
  const int64_t inner = block.scratch_floats(x.h, x.w), out = y.c * y.h * y.w;
  const int64_t step = std::min(std::max(kept, soft), (threads == 1 ? 1 : num_threads()) * samples_at_a_time(inner));
  const Scratch scratch(step * (inner + (soft > 0 ? out : 0)));
  for (int64_t i = 0; i < kept; i += step) {
    const int64_t* rows = decision.kept.data() + i;
    block.run(x, rows, residual, rows, y, rows, std::min(step, kept - i), scratch.data(), threads);
  }
  for (int64_t i = 0; i < soft; i += step) {
    const int64_t* rows = decision.soft.data() + i;
    const int64_t count = std::min(step, soft - i);
    const conv::Activation z = nhwc(scratch.data() + step * inner, count, y.c, y.h, y.w);
    block.run(x, rows, residual, rows, z, nullptr, count, scratch.data(), threads);
    blend_rows(z, decision.gate.data() + i, residual, y, rows, count);
  }
}

}  // namespace effkern::block_skip
