// A weight's gradient to run in the harness: what the kernel may touch, the launch, and the sums in double it is held
// to, slice by slice.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../../conv_backward/backward_model.h"
#include "../../conv_backward/depthwise_wgrad.cuh"
#include "../../conv_backward/wgrad.cuh"
#include "../../conv_backward/wgrad_model.h"
#include "../check.h"
#include "array.h"
#include "launch.h"
#include "schedules.h"
#include "traffic.h"

namespace effkern::test::simt {

using conv::gpu::Math;
using conv::gpu::Size2;
using conv::gpu::Wgrad;
using device::BF16;
using device::F16;

struct WgradCase {
  int n = 2, h = 5, w = 6, c_in = 16, c_out = 16;
  Size2 kernel{3, 3}, stride{1, 1}, pad{1, 1}, dilation{1, 1};
  int groups = 1;
  int slice = 1 << 20;  // pixels, rounded up to whole stages
  bool chunks = true;   // pixels begin at whole sectors, behind channels that no one may read
  bool normal = false;  // else integers, whose sums are exact
  int64_t far = 0;      // added to the stride of x's rows, to pass 2^31: one row is read, the second
  // What lists in device memory say: `listed` samples alone, or widths (inputs, outputs) for every sample.
  std::optional<std::vector<int>> listed = {};
  std::vector<Size2> widths = {};
};

inline std::string text(const WgradCase& c) {
  return test::text("n ", c.n, " map ", c.h, "x", c.w, " channels ", c.c_in, " -> ", c.c_out, " kernel ", c.kernel.h,
                    "x", c.kernel.w, " groups ", c.groups, " slice ", c.slice);
}

// kDepthwise: c_in = c_out = 1, one filter a channel.
template <class T, Math kMath, bool kDepthwise>
class WgradRun {
 public:
  WgradRun(const WgradCase& c, int depth, int tile_m, uint32_t seed)
      : c_(c), rng_(seed), depth_(depth), tile_m_(tile_m) {
    const auto span = [](int size, int kernel, int stride, int pad, int dilation) {
      return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
    };
    out_ = {c.far != 0 ? 1 : span(c.h, c.kernel.h, c.stride.h, c.pad.h, c.dilation.h),
            span(c.w, c.kernel.w, c.stride.w, c.pad.w, c.dilation.w)};
    const auto pitch = [&](int channels) {
      constexpr int u = device::kPerChunk<T>;
      return c.chunks ? (channels + 4 * u) / (4 * u) * (4 * u) : channels + 1;
    };
    pitch_x_ = pitch(c.c_in * c.groups), pitch_g_ = pitch(c.c_out * c.groups);
    const int chunk = kDepthwise ? 1 : device::kPerChunk<T>;
    taps_ = c.kernel.h * c.kernel.w;
    tap_columns_ = (c.c_in + chunk - 1) / chunk * chunk, columns_ = tap_columns_ * taps_;
    rows_ = c.n * out_.h * out_.w;
    slice_ = std::min((c.slice + depth - 1) / depth * depth, (rows_ + depth - 1) / depth * depth);
    count_ = (rows_ + slice_ - 1) / slice_;
    x_.emplace("x", int64_t{1} * c.n * c.h * c.w * pitch_x_), gz_.emplace("gz", int64_t{1} * rows_ * pitch_g_);
    parts_.emplace("parts", int64_t{1} * count_ * c.groups * c.c_out * columns_);
    lists();
    for (const int n : entries_) {
      const auto put = [&](Array<T>& map, int pixels, int pitch, int channels) {
        for (int i = n * pixels; i < (n + 1) * pixels; ++i)
          for (int k = 0; k < channels; ++k) map.put(int64_t{1} * i * pitch + k, value());
      };
      const bool own = !c.widths.empty();
      put(*x_, c.h * c.w, pitch_x_, own ? width(n).h : c.c_in * c.groups);
      put(*gz_, out_.h * out_.w, pitch_g_, own ? width(n).w : c.c_out * c.groups);
    }
    for (int64_t i = 0; i < int64_t{1} * count_ * c.groups * c.c_out * columns_; ++i) parts_->output(i);
  }

  Wgrad<T> problem() const {
    Wgrad<T> p{};
    p.x = x_->global(), p.gz = gz_->global(), p.parts = parts_->global();
    if (c_.far != 0) p.x = p.x + -c_.far;
    p.xs = {int64_t{1} * c_.h * c_.w * pitch_x_, int64_t{1} * c_.w * pitch_x_ + c_.far, pitch_x_};
    p.gs = {int64_t{1} * out_.h * out_.w * pitch_g_, int64_t{1} * out_.w * pitch_g_, pitch_g_};
    p.in = {c_.h, c_.w}, p.out = out_, p.kernel = c_.kernel, p.stride = c_.stride, p.pad = c_.pad;
    p.dilation = c_.dilation, p.groups = c_.groups, p.c_in = c_.c_in, p.c_out = c_.c_out;
    p.tap_columns = tap_columns_, p.columns = columns_, p.slices = {rows_, slice_, count_};
    p.wide = pitch_x_ % device::kPerChunk<T> == 0 && pitch_g_ % device::kPerChunk<T> == 0;
    if (c_.listed) p.rows = order_->global(), p.count = number_->global();
    if (!c_.widths.empty()) {
      p.in_of = {in_->global(), 2, true};
      p.out_of = {outs_->global(), 2, true};
      if (!kDepthwise) p.rows = order_->global(), p.classes = parts_of_->global(), p.class_count = number_->global();
    }
    return p;
  }

  template <class Kernel>
  Report run(unsigned grid, int threads, int shared, uint32_t seed, bool counters, const Kernel& kernel) {
    parts_->poison();
    Launch launch{.grid = grid, .threads = threads, .shared = static_cast<size_t>(shared), .seed = seed};
    launch.granule = sizeof(T), launch.counters = counters, launch.resident = seed % 5 == 4 ? 2 : 1;
    const Wgrad<T> p = problem();
    return simt::run(launch, [&] { kernel(p); });
  }

  // The pixels that output o sums, in slices.
  device::Slices slices_of(int o) const {
    const device::Slices all{rows_, slice_, count_};
    if (kDepthwise || (!c_.listed && c_.widths.empty())) return all;
    int reached = 0;
    for (const int n : entries_) reached += c_.widths.empty() || width(n).w > o / tile_m_ * tile_m_;
    const device::Slices cut = device::slices_within(all, reached * out_.h * out_.w, depth_);
    EXPECT(int64_t{cut.slice} * cut.count >= cut.rows && cut.slice % depth_ == 0);
    return cut;
  }
  const std::vector<conv::gpu::Part>& classes() const { return classes_; }

  // Every part: the right sum stored once, zeros in the columns that fill a tap's last chunk.
  std::string compare() const {
    for (int s = 0; s < count_; ++s)
      for (int o = 0; o < c_.c_out * c_.groups; ++o) {
        const device::Slices slices = slices_of(o);
        for (int column = 0; column < columns_; ++column) {
          const int64_t at = (int64_t{1} * s * c_.c_out * c_.groups + o) * columns_ + column;
          double sum = 0, size = 0;
          const int tap = column / tap_columns_, c = column % tap_columns_;
          if (c < c_.c_in)
            for (int i = s * slices.slice; i < std::min(slices.rows, (s + 1) * slices.slice); ++i) {
              const double term = product(i, o, tap / c_.kernel.w, tap % c_.kernel.w, c);
              sum += term, size += std::fabs(term);
            }
          const double bound = c_.normal ? (slices.slice / 2 + 8) * 0x1p-24 * size : 0.0;
          const float got = parts_->get(at);
          if (parts_->stores(at) != 1 || !(std::fabs(got - sum) <= bound))
            return test::text("parts[", at, "] is ", got, " after ", parts_->stores(at), " stores, not ", sum, " +- ",
                              bound);
        }
      }
    return "";
  }

 private:
  T value() {
    if (!c_.normal) return device::from_float<T>(static_cast<float>(static_cast<int>(rng_() % 7) - 3));
    return device::from_float<T>(std::normal_distribution<float>()(rng_));
  }
  static double operand(T value) {
    const float wide = device::to_float(value);
    return kMath == Math::TF32 ? bits_to_float(device::round_tf32(float_to_bits(wide))) : wide;
  }
  // Of the pixel-th pixel of all entries.
  double product(int pixel, int o, int kh, int kw, int c) const {
    const int n = entries_[static_cast<size_t>(pixel / out_.w / out_.h)], h = pixel / out_.w % out_.h,
              w = pixel % out_.w;
    const int y = h * c_.stride.h - c_.pad.h + kh * c_.dilation.h, x = w * c_.stride.w - c_.pad.w + kw * c_.dilation.w;
    if (y < 0 || y >= c_.h || x < 0 || x >= c_.w) return 0;
    const int from = o / c_.c_out * c_.c_in + c;
    if (!c_.widths.empty() && (from >= width(n).h || o >= width(n).w)) return 0;
    return operand(gz_->get(((int64_t{1} * n * out_.h + h) * out_.w + w) * pitch_g_ + o)) *
           operand(x_->get(((int64_t{1} * n * c_.h + y) * c_.w + x) * pitch_x_ + from));
  }

  // What a sample has of both; depthwise, as much as it has of the other.
  Size2 width(int n) const {
    const Size2 own = c_.widths[static_cast<size_t>(n)];
    return kDepthwise ? Size2{std::min(own.h, own.w), std::min(own.h, own.w)} : own;
  }
  // Entries in the order of their sums, and the lists that say so.
  void lists() {
    for (int n = 0; n < c_.n; ++n) entries_.push_back(n);
    if (c_.listed) entries_ = *c_.listed;
    if (!c_.widths.empty()) {
      in_.emplace("in", 2 * c_.n), outs_.emplace("out", 2 * c_.n);  // words of int64
      for (int n = 0; n < c_.n; ++n) {
        in_->put(2 * n, c_.widths[size_t(n)].h), in_->put(2 * n + 1, 0);
        outs_->put(2 * n, c_.widths[size_t(n)].w), outs_->put(2 * n + 1, 0);
      }
      if (!kDepthwise)
        std::stable_sort(entries_.begin(), entries_.end(), [&](int a, int b) {
          return std::pair(-width(a).w, -width(a).h) < std::pair(-width(b).w, -width(b).h);
        });
      for (int i = 0; i < c_.n; ++i) {
        const Size2 own = width(entries_[size_t(i)]);
        const bool same = !classes_.empty() && classes_.back().c_in == own.h && classes_.back().c_out == own.w;
        if (!same) classes_.push_back({own.h, own.w, i, 0});
        ++classes_.back().count;
      }
    }
    order_.emplace("order", c_.n), number_.emplace("number", 1);
    parts_of_.emplace("classes", std::max(c_.n, 1));
    for (size_t i = 0; i < entries_.size(); ++i) order_->put(static_cast<int64_t>(i), entries_[i]);
    for (size_t i = 0; i < classes_.size(); ++i) parts_of_->put(static_cast<int64_t>(i), classes_[i]);
    number_->put(0, static_cast<int32_t>(c_.listed ? entries_.size() : classes_.size()));
  }

  WgradCase c_;
  std::mt19937 rng_;
  const int depth_, tile_m_;
  std::vector<int> entries_;
  std::vector<conv::gpu::Part> classes_;
  std::optional<Array<int32_t>> order_, number_;
  std::optional<Array<conv::gpu::Part>> parts_of_;
  std::optional<Array<int32_t>> in_, outs_;
  Size2 out_;
  int pitch_x_, pitch_g_, taps_, tap_columns_, columns_, rows_, slice_, count_;
  std::optional<Array<T>> x_, gz_;
  std::optional<Array<float>> parts_;
};

template <class C>
using GemmRun = WgradRun<typename C::T, C::kMath, false>;

template <class C>
Report run_gemm(GemmRun<C>& run, uint32_t seed, bool counters = false) {
  const auto p = run.problem();
  const unsigned grid = static_cast<unsigned>(conv::gpu::wgrad_tiles<C>(p) * p.slices.count);
  return run.run(grid, C::kThreads, C::kShared, seed, counters, [](const auto& p) { conv::gpu::wgrad_kernel<C>(p); });
}

template <class C>
void wgrad_holds(const WgradCase& c, int seeds = kSchedules) {
  GemmRun<C> run(c, C::kDepth, C::kTileM, 3);
  holds_under_schedules(
      text(c), c.normal, 0, seeds, [&](uint32_t seed) { return run_gemm<C>(run, seed); },
      [&] { return run.compare(); });
}

template <class T>
void depthwise_wgrad_holds(const WgradCase& c, int seeds = kSchedules) {
  WgradRun<T, Math::F32, true> run(c, 1, 1, 4);
  const auto p = run.problem();
  const int groups = (c.groups + device::kColumns<T> - 1) / device::kColumns<T>;
  const int tap_groups = (c.kernel.h * c.kernel.w + conv::gpu::kTapsAtOnce - 1) / conv::gpu::kTapsAtOnce;
  const auto go = [&](uint32_t seed) {
    Report report = run.run(static_cast<unsigned>(groups * tap_groups * p.slices.count), device::kColumnThreads,
                            device::kColumnShared, seed, seed == 0,
                            [](const auto& p) { conv::gpu::depthwise_wgrad<decltype(T{})>(p); });
    if (seed == 0 && report.ok() && c.widths.empty())
      expect_traffic(report, depthwise_wgrad_work(p, conv::gpu::kTapsAtOnce), text(c));
    return report;
  };
  holds_under_schedules(text(c), c.normal, 0, seeds, go, [&] { return run.compare(); });
}

// Tails of rows, columns, chunks and pixels; more stages of pixels than are kept, and fewer; slices; geometry.
template <class C>
void wgrad_tails() {
  constexpr int u = device::kPerChunk<typename C::T>;
  constexpr bool any = C::kAligned;
  wgrad_holds<C>({.n = 3, .h = 7, .w = 5, .c_in = 3 * u, .c_out = 2 * u, .chunks = any});
  wgrad_holds<C>({.n = 3, .h = 9, .w = 7, .c_in = 2 * u + 3, .c_out = 9 * u + 1, .slice = 160, .chunks = any}, 3);
  wgrad_holds<C>({.n = 1, .h = 2, .w = 3, .c_in = 1, .c_out = 1, .kernel = {1, 1}, .pad = {0, 0}, .chunks = any}, 3);
  wgrad_holds<C>({.n = 4,
                  .h = 9,
                  .w = 8,
                  .c_in = u,
                  .c_out = 8 * u,
                  .kernel = {2, 3},
                  .stride = {2, 1},
                  .pad = {0, 2},
                  .dilation = {2, 3},
                  .groups = 2,
                  .chunks = any},
                 3);
  wgrad_holds<C>({.n = 9,
                  .h = 4,
                  .w = 3,
                  .c_in = 2 * u,
                  .c_out = 128,
                  .kernel = {1, 1},
                  .pad = {0, 0},
                  .chunks = any,
                  .normal = true},
                 4);
  wgrad_holds<C>({.n = 70, .h = 1, .w = 1, .c_in = u, .c_out = u, .slice = 40, .chunks = any}, 2);
}

// Lists of samples: some, none, one; and widths that differ, from none to all.
template <class C>
void wgrad_lists(int seeds = 3) {
  constexpr int u = device::kPerChunk<typename C::T>;
  constexpr bool any = C::kAligned;
  WgradCase c{.n = 7, .h = 3, .w = 4, .c_in = 2 * u, .c_out = 3 * u, .slice = 64, .chunks = any};
  for (const std::vector<int>& list : std::vector<std::vector<int>>{{0, 2, 3, 6}, {}, {5}, {6, 1, 1, 0, 3, 4, 2}}) {
    c.listed = list;
    wgrad_holds<C>(c, seeds);
  }
  c.h = 7, c.w = 6, c.stride = {2, 1}, c.kernel = {2, 3}, c.listed = {{4, 1, 5}};
  wgrad_holds<C>(c, seeds);
  WgradCase r{.n = 6, .h = 4, .w = 3, .c_in = 2 * u + 1, .c_out = 9 * u + 3, .slice = 64, .chunks = any};
  r.widths = {{u, 2}, {2 * u + 1, 9 * u + 3}, {0, u}, {u, 2}, {3, 0}, {1, 8 * u + 1}};
  wgrad_holds<C>(r, seeds);
  r.n = 9, r.h = r.w = 1, r.kernel = {1, 1}, r.pad = {0, 0}, r.normal = true;
  for (const Size2 more : {Size2{u, 9 * u}, {2 * u, 1}, {2 * u + 1, 5}}) r.widths.push_back(more);
  wgrad_holds<C>(r, seeds);
}

// No bank conflict, whole sectors, bytes and products as the model says.
template <class C>
void measure_wgrad(const WgradCase& c) {
  GemmRun<C> run(c, C::kDepth, C::kTileM, 5);
  const Report report = run_gemm<C>(run, 3, true);
  EXPECT(report.ok() && run.compare().empty(), report.what);
  const auto cost = [&](Op op) { return report.cost.count(op) != 0 ? report.cost.at(op) : Cost{}; };
  for (const Op op : {Op::LoadMatrix, Op::AsyncCopyShared, Op::AsyncCopy, Op::LoadShared, Op::StoreGlobal})
    EXPECT(cost(op).passes == cost(op).least, "operation ", static_cast<int>(op), ": ", cost(op).passes, " passes for ",
           cost(op).least);
  EXPECT(cost(Op::StoreGlobal).bytes_per_lane == 16);
  auto asked = run.problem();
  if (c.listed) asked.slices = run.slices_of(0);
  const auto model = conv::gpu::wgrad_work<C>(asked, run.classes());
  EXPECT(cost(Op::AsyncCopy).bytes == model.bytes_gz + model.bytes_x, cost(Op::AsyncCopy).bytes, " bytes read, model ",
         model.bytes_gz + model.bytes_x);
  EXPECT(cost(Op::StoreGlobal).bytes == model.bytes_parts, cost(Op::StoreGlobal).bytes, " bytes written, model ",
         model.bytes_parts);
  EXPECT(report.mma == model.mma, report.mma, " products, model ", model.mma);
}

}  // namespace effkern::test::simt
