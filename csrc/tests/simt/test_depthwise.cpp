// The GPU's depthwise convolution on the CPU, against sums in double: every type, map sizes around the tiles, strides,
// dilations, kernels, uniform widths and widths that differ by sample. What it may not touch is forbidden.
#include "../../conv/depthwise.cuh"
#include "../../conv/depthwise_model.h"
#include "conv_case.h"
#include "traffic.h"

namespace effkern::test::simt {
namespace {

using conv::gpu::DepthwiseProblem;
using conv::gpu::Size2;

struct Shape {
  int n = 2, h = 6, w = 7, channels = 40, kernel_h = 3, kernel_w = 3, stride = 1, pad = 1, dilation = 1;
  int extra = 0;  // channels of the buffers past the ones used
  std::vector<int> widths_in = {}, widths_out = {};
  int zero_to = 0;
  Act act = Act::None;
  bool residual = false, scale = false, bias = false;
  int tables = 1;
};

std::string name(const Shape& s) {
  return test::text("n ", s.n, " map ", s.h, "x", s.w, " channels ", s.channels, " kernel ", s.kernel_h, "x",
                    s.kernel_w, " stride ", s.stride, " pad ", s.pad, " dilation ", s.dilation);
}

template <class T>
class DepthwiseRun {
 public:
  DepthwiseRun(const Shape& s, uint32_t seed)
      : s_(s),
        rng_(seed),
        oh_((s.h + 2 * s.pad - s.dilation * (s.kernel_h - 1) - 1) / s.stride + 1),
        ow_((s.w + 2 * s.pad - s.dilation * (s.kernel_w - 1) - 1) / s.stride + 1),
        pitch_(std::max(s.channels, s.zero_to) + s.extra),
        x_("x", int64_t{1} * s.n * s.h * s.w * pitch_),
        weight_("weight", int64_t{1} * s.channels * s.kernel_h * s.kernel_w),
        y_("y", int64_t{1} * s.n * oh_ * ow_ * pitch_),
        residual_("residual", int64_t{1} * s.n * oh_ * ow_ * pitch_),
        bias_("bias", s.channels),
        scale_("scale", s.channels * s.tables),
        shift_("shift", s.channels * s.tables),
        in_("c_in", s.n),
        out_("c_out", s.n),
        table_("table", s.n) {
    int widest = 0;
    for (int n = 0; n < s.n; ++n) {
      if (!s.widths_in.empty()) in_.put(n, s.widths_in[static_cast<size_t>(n)]);
      if (!s.widths_out.empty()) out_.put(n, s.widths_out[static_cast<size_t>(n)]);
      table_.put(n, n % s.tables);
      const int width = active(n), written = std::max(width, s.zero_to);
      widest = std::max(widest, width);
      for (int i = 0; i < s.h * s.w; ++i)
        for (int c = 0; c < width; ++c) x_.put((int64_t{1} * n * s.h * s.w + i) * pitch_ + c, value());
      for (int i = 0; i < oh_ * ow_; ++i) {
        const int64_t at = (int64_t{1} * n * oh_ * ow_ + i) * pitch_;
        for (int c = 0; c < written; ++c) y_.output(at + c);
        for (int c = 0; s.residual && c < width; ++c) residual_.put(at + c, value());
      }
    }
    const int taps = s.kernel_h * s.kernel_w;
    for (int i = 0; i < widest * taps; ++i) weight_.put(i, value());
    for (int c = 0; c < widest; ++c) {
      bias_.put(c, static_cast<float>(draw(5) - 2));
      for (int t = 0; t < s.tables; ++t) {
        scale_.put(t * s.channels + c, draw(2) == 0 ? 0.5f : 2.0f);
        shift_.put(t * s.channels + c, static_cast<float>(draw(7) - 3));
      }
    }
  }

  DepthwiseProblem<T> problem() {
    DepthwiseProblem<T> p{};
    p.x = x_.global(), p.weight = weight_.global(), p.y = y_.global();
    p.xs = {int64_t{1} * s_.h * s_.w * pitch_, int64_t{1} * s_.w * pitch_, pitch_};
    p.ys = p.rs = {int64_t{1} * oh_ * ow_ * pitch_, int64_t{1} * ow_ * pitch_, pitch_};
    if (s_.residual) p.residual = residual_.global();
    p.weight_channel = s_.kernel_h * s_.kernel_w, p.weight_h = s_.kernel_w, p.weight_w = 1;
    p.in = {s_.h, s_.w}, p.out = {oh_, ow_}, p.kernel = {s_.kernel_h, s_.kernel_w};
    p.stride = {s_.stride, s_.stride}, p.pad = {s_.pad, s_.pad}, p.dilation = {s_.dilation, s_.dilation};
    p.samples = s_.n, p.channels = s_.channels, p.zero_to = s_.zero_to;
    if (!s_.widths_in.empty()) p.c_in = {in_.global(), 1, false};
    if (!s_.widths_out.empty()) p.c_out = {out_.global(), 1, false};
    if (s_.bias) p.bias = bias_.global();
    if (s_.scale) p.scale = scale_.global(), p.shift = shift_.global();
    p.table_stride = s_.channels;
    if (s_.tables > 1) p.table = {table_.global(), 1, false}, p.most_row = s_.tables - 1;
    p.act = s_.act;
    const bool whole = pitch_ % (16 / static_cast<int>(sizeof(T))) == 0;
    p.wide_x = p.wide_y = p.wide_residual = whole;
    p.strips = conv::gpu::strips_for(ow_);
    EXPECT(fits(p), name(s_));
    return p;
  }

  static constexpr unsigned kGrid = 3;

  Report run(uint32_t seed, bool counters = false) {
    y_.poison();
    const DepthwiseProblem<T> p = problem();
    const bool sliding = s_.kernel_w == 3 && s_.stride == 1 && s_.dilation == 1;
    Launch launch{.grid = kGrid,
                  .threads = conv::gpu::kDepthwiseThreads,
                  .shared = static_cast<size_t>(depthwise_shared(p)),
                  .seed = seed,
                  .resident = seed % 5 == 4 ? 2 : 1,
                  .granule = sizeof(T),
                  .counters = counters};
    const int32_t tiles = static_cast<int32_t>(depthwise_tiles(p));
    return simt::run(launch, [&] {
      if (sliding)
        conv::gpu::depthwise<T, true>(p, tiles);
      else
        conv::gpu::depthwise<T, false>(p, tiles);
    });
  }

  std::string compare() {
    for (int n = 0; n < s_.n; ++n)
      for (int i = 0; i < oh_ * ow_; ++i)
        for (int c = 0; c < pitch_; ++c) {
          const int64_t at = (int64_t{1} * n * oh_ * ow_ + i) * pitch_ + c;
          const bool written = c < std::max(active(n), s_.zero_to);
          const double want = c < active(n) ? element(n, i / ow_, i % ow_, c, at) : 0.0;
          const float got = device::to_float(y_.get(at)),
                      rounded = device::to_float(device::from_float<T>(static_cast<float>(want)));
          const bool curve = s_.act == Act::Hardswish || s_.act == Act::Silu;
          const double bound = curve ? 0x1p-8 * std::fabs(want) * (sizeof(T) == 4 ? 0x1p-12 : 1.0) + 0x1p-20 : 0.0;
          if (y_.stores(at) != (written ? 1 : 0) || (written && !(std::fabs(got - rounded) <= bound)))
            return test::text("y[", at, "] is ", got, " after ", y_.stores(at), " stores, not ", want, " after ",
                              written);
        }
    return "";
  }

 private:
  int draw(int below) { return static_cast<int>(rng_() % static_cast<uint32_t>(below)); }
  T value() { return device::from_float<T>(static_cast<float>(draw(7) - 3)); }
  int active(int n) const {
    int width = s_.channels;
    if (!s_.widths_in.empty()) width = std::clamp(s_.widths_in[static_cast<size_t>(n)], 0, width);
    if (!s_.widths_out.empty()) width = std::clamp(s_.widths_out[static_cast<size_t>(n)], 0, width);
    return width;
  }
  double element(int n, int y, int x, int c, int64_t at) {
    double sum = 0;
    for (int kh = 0; kh < s_.kernel_h; ++kh)
      for (int kw = 0; kw < s_.kernel_w; ++kw) {
        const int h = y * s_.stride - s_.pad + kh * s_.dilation, w = x * s_.stride - s_.pad + kw * s_.dilation;
        if (h < 0 || h >= s_.h || w < 0 || w >= s_.w) continue;
        sum += static_cast<double>(device::to_float(x_.get(((int64_t{1} * n * s_.h + h) * s_.w + w) * pitch_ + c))) *
               device::to_float(weight_.get((int64_t{1} * c * s_.kernel_h + kh) * s_.kernel_w + kw));
      }
    const int64_t table = int64_t{1} * (n % s_.tables) * s_.channels + c;
    if (s_.bias) sum += bias_.get(c);
    if (s_.scale) sum = sum * scale_.get(table) + shift_.get(table);
    if (s_.residual) sum += device::to_float(residual_.get(at));
    switch (s_.act) {
      case Act::Relu:
        return std::max(sum, 0.0);
      case Act::Relu6:
        return std::clamp(sum, 0.0, 6.0);
      case Act::Hardswish:
        return sum * std::clamp(sum + 3.0, 0.0, 6.0) / 6.0;
      case Act::Silu:
        return sum / (1.0 + std::exp(-sum));
      default:
        return sum;
    }
  }

  Shape s_;
  std::mt19937 rng_;
  int oh_, ow_, pitch_;
  Array<T> x_, weight_, y_, residual_;
  Array<float> bias_, scale_, shift_;
  Array<int32_t> in_, out_, table_;
};

template <class T>
void depthwise_holds(const Shape& s, int seeds = kSchedules) {
  DepthwiseRun<T> run(s, 3);
  holds_under_schedules(
      name(s), false, 0, seeds, [&](uint32_t seed) { return run.run(seed); }, [&] { return run.compare(); });
}

template <class T>
void every_form(int seeds) {
  for (const int width : {1, 4, 5, 9, 17}) depthwise_holds<T>({.n = 1, .h = 5, .w = width, .channels = 24}, seeds);
  depthwise_holds<T>(
      {.h = 18, .w = 3, .channels = 72, .act = Act::Relu, .residual = true, .scale = true, .bias = true, .tables = 2},
      seeds);
  depthwise_holds<T>({.n = 1, .h = 9, .w = 8, .channels = 37, .stride = 2, .act = Act::Hardswish, .residual = true},
                     seeds);
  depthwise_holds<T>(
      {.n = 1, .h = 9, .w = 10, .channels = 19, .pad = 2, .dilation = 2, .act = Act::Relu6, .bias = true}, seeds);
  depthwise_holds<T>(
      {.n = 1, .h = 8, .w = 7, .channels = 8, .kernel_h = 5, .kernel_w = 5, .pad = 2, .extra = 8, .act = Act::Silu},
      seeds);
  depthwise_holds<T>({.n = 1, .h = 5, .w = 6, .channels = 16, .kernel_h = 1, .kernel_w = 3, .pad = 2}, seeds);
  depthwise_holds<T>({.n = 4,
                      .h = 3,
                      .w = 5,
                      .channels = 80,
                      .widths_in = {80, 24, 0, 9},
                      .widths_out = {80, 20, 80, 99},
                      .zero_to = 80,
                      .residual = true,
                      .scale = true,
                      .bias = true,
                      .tables = 3},
                     seeds);
  depthwise_holds<T>({.n = 3, .h = 3, .w = 3, .channels = 13, .widths_in = {13, -2, 5}, .zero_to = 21}, seeds);
  depthwise_holds<T>({.n = 3, .h = 3, .w = 3, .channels = 37, .widths_in = {37, 0, 9}}, seeds);  // nothing past a width
  // A block's next tile has filters of its own: of other channels as many, and of more of the same.
  constexpr int kTile = conv::gpu::kPixelBytes / static_cast<int>(sizeof(T));
  depthwise_holds<T>({.n = 3, .h = 3, .w = 3, .channels = 2 * kTile, .widths_in = {2 * kTile, 0, kTile}}, 2);
  depthwise_holds<T>({.n = 4, .h = 3, .w = 3, .channels = 37, .widths_in = {9, 0, 5, 37}}, 2);
}

template <class T>
void depthwise_measured(const Shape& s) {
  DepthwiseRun<T> run(s, 5);
  Report report = run.run(3, true);
  EXPECT(report.ok() && run.compare().empty(), report.what);
  expect_traffic(report, conv::gpu::depthwise_work(run.problem(), run.kGrid), name(s));
}

}  // namespace

TEST(depthwise_gpu_f16) { every_form<device::F16>(kSchedules); }
TEST(depthwise_gpu_f32) { every_form<float>(kSchedules); }
TEST(depthwise_gpu_bf16) { every_form<device::BF16>(2); }

TEST(depthwise_gpu_moves_what_its_model_says) {
  depthwise_measured<device::F16>(
      {.n = 2, .h = 9, .w = 17, .channels = 72, .residual = true, .scale = true, .bias = true});
  depthwise_measured<device::BF16>({.h = 9, .w = 6, .channels = 19, .stride = 2, .zero_to = 24});
  depthwise_measured<float>({.n = 1, .h = 10, .w = 3, .channels = 37, .pad = 2, .dilation = 2, .bias = true});
}

TEST(depthwise_gpu_grid_is_of_whole_groups) {
  conv::gpu::DepthwiseProblem<device::F16> p{};
  p.channels = 130, p.samples = 100, p.strips = 4, p.out = {4, 16};
  EXPECT(depthwise_tiles(p) == 300 && depthwise_grid(p, 100) == 99 && depthwise_grid(p, 2) == 2);
  EXPECT(depthwise_grid(p, 1000) == 300);
}

TEST(depthwise_gpu_touches_banks_and_sectors_once) {
  DepthwiseRun<device::F16> run({.n = 1, .h = 8, .w = 16, .channels = 64, .residual = true}, 5);
  const Report report = run.run(3, true);
  EXPECT(report.ok() && run.compare().empty(), report.what);
  for (const Op op : {Op::AsyncCopy, Op::AsyncCopyShared, Op::LoadShared, Op::StoreGlobal}) {
    const Cost cost = report.cost.at(op);
    EXPECT(cost.passes == cost.least, "operation ", static_cast<int>(op), ": ", cost.passes, " passes for ",
           cost.least);
  }
  // Two tiles of 4 x 16 outputs, each with the rows of the map that lie under it: 5, and the padding is not read.
  EXPECT(report.cost.at(Op::AsyncCopy).bytes == 2 * 5 * 16 * 128, report.cost.at(Op::AsyncCopy).bytes);
  EXPECT(report.cost.at(Op::StoreGlobal).bytes == 8 * 16 * 128 && report.cost.at(Op::StoreGlobal).bytes_per_lane == 16);
}

}  // namespace effkern::test::simt
