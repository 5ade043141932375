// A convolution to run in the harness: memories in which exactly what the kernel may touch is permitted, the launch,
// and the sum in double it is held to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../../conv/conv_configs.cuh"
#include "../../conv/conv_gpu_plan.h"
#include "../../conv/conv_model.h"
#include "../check.h"
#include "array.h"
#include "launch.h"
#include "schedules.h"

namespace effkern::test::simt {

using conv::gpu::Act;
using conv::gpu::Math;
using conv::gpu::Part;

enum class Values { Integers, Normal };

struct Case {
  int n = 1, h = 5, w = 5, c_in = 16, c_out = 16, kernel = 3, stride = 1, pad = 1, dilation = 1, groups = 1;
  int ci = 0, co = 0;            // the whole weight's channels a group; 0: c_in, c_out
  int extra_x = 0, extra_y = 0;  // channels of the buffers past the ones used
  Act act = Act::None;
  bool scale = false, shift = true, residual = false;
  int tables = 1;                             // rows of scale and shift
  std::vector<int> x_rows = {}, y_rows = {};  // one a listed sample; empty: as they come
  int count = -1;                             // through device memory, at most n
  std::vector<Part> parts = {};
  int zero_to = 0;
  bool bias = false;
  bool gate = false;    // soft for some samples of y
  bool copies = false;  // entries past the count copy their residual
  Values values = Values::Integers;
  bool infinite = false;  // some of x
  int64_t far = 0;        // added to the strides from sample to sample, to pass 2^31
};

inline std::string text(const Case& c) {
  return test::text("n ", c.n, " map ", c.h, "x", c.w, " channels ", c.c_in, "/", c.ci, " -> ", c.c_out, "/", c.co,
                    " kernel ", c.kernel, " stride ", c.stride, " pad ", c.pad, " dilation ", c.dilation, " groups ",
                    c.groups);
}

template <class C>
class Run {
 public:
  using T = typename C::T;

  // `like`: takes its numbers where both have them.
  Run(const Case& c, uint32_t seed, const Run* like = nullptr) : c_(c), rng_(seed) {
    ci_ = c.ci != 0 ? c.ci : c.c_in, co_ = c.co != 0 ? c.co : c.c_out;
    for (const Part& part : c.parts) ci_ = std::max(ci_, part.c_in), co_ = std::max(co_, part.c_out);
    const int span = c.dilation * (c.kernel - 1) + 1;
    oh_ = (c.h + 2 * c.pad - span) / c.stride + 1, ow_ = (c.w + 2 * c.pad - span) / c.stride + 1;
    pitch_x_ = ci_ * c.groups + c.extra_x, pitch_y_ = std::max(co_ * c.groups, c.zero_to) + c.extra_y;
    parts_ = c.parts;
    if (parts_.empty()) parts_.push_back({c.c_in, c.c_out, 0, c.count >= 0 ? c.count : c.n});
    x_.emplace("x", int64_t{1} * c.n * c.h * c.w * pitch_x_);
    weight_.emplace("weight", int64_t{1} * c.groups * co_ * c.kernel * c.kernel * ci_);
    y_.emplace("y", int64_t{1} * c.n * oh_ * ow_ * pitch_y_);
    residual_.emplace("residual", c.residual ? int64_t{1} * c.n * oh_ * ow_ * pitch_y_ : 1);
    const int64_t table = int64_t{1} * c.tables * co_ * c.groups;
    scale_.emplace("scale", table), shift_.emplace("shift", table);
    for (int64_t i = 0; i < table; ++i) {
      scale_->put(i, c.values == Values::Integers ? (draw(2) == 0 ? 0.5f : 2.0f) : real());
      shift_->put(i, c.values == Values::Integers ? static_cast<float>(draw(7) - 3) : real());
    }
    bias_.emplace("bias", int64_t{1} * co_ * c.groups);
    for (int64_t i = 0; i < co_ * c.groups; ++i)
      bias_->put(i, c.values == Values::Integers ? static_cast<float>(draw(5) - 2) : real());
    gate_.emplace("gate", c.n);
    for (int n = 0; n < c.n; ++n) gate_->put(n, draw(2) == 0 ? 1.0f : 0.25f);
    lists();
    fill();
    if (like != nullptr)
      x_->copy_values(*like->x_), weight_->copy_values(*like->weight_), shift_->copy_values(*like->shift_);
  }

  conv::gpu::Problem<T> problem() const {
    conv::gpu::Problem<T> p{};
    const int64_t sx = int64_t{1} * c_.h * c_.w * pitch_x_, sy = int64_t{1} * oh_ * ow_ * pitch_y_;
    // A far stride from sample to sample, taken back for sample 1, the only one listed: its offsets pass 2^31.
    p.x = x_->global(), p.weight = weight_->global(), p.y = y_->global();
    if (c_.far != 0) p.x = p.x + -c_.far, p.y = p.y + -c_.far;
    p.xs = {sx + c_.far, int64_t{1} * c_.w * pitch_x_, pitch_x_};
    p.ys = p.rs = {sy + c_.far, int64_t{1} * ow_ * pitch_y_, pitch_y_};
    if (c_.residual) p.residual = residual_->global() + -c_.far;
    p.weight_tap = ci_, p.weight_row = int64_t{1} * c_.kernel * c_.kernel * ci_;
    p.groups = c_.groups, p.group_rows = co_;
    p.in = {c_.h, c_.w}, p.out = {oh_, ow_}, p.kernel = {c_.kernel, c_.kernel}, p.stride = {c_.stride, c_.stride};
    p.pad = {c_.pad, c_.pad}, p.dilation = {c_.dilation, c_.dilation};
    p.whole = {c_.c_in, c_.c_out, 0, c_.n};
    if (c_.count >= 0) p.count = count_->global();
    if (!c_.parts.empty()) p.parts = part_list_->global(), p.part_count = part_count_->global();
    if (!c_.x_rows.empty()) p.x_rows = x_rows_->global();
    if (!c_.y_rows.empty()) p.y_rows = p.residual_rows = y_rows_->global();
    p.zero_to = c_.zero_to;
    if (c_.scale) p.scale = scale_->global();
    if (c_.shift) p.shift = shift_->global();
    p.table_stride = co_ * c_.groups;
    if (c_.tables > 1) p.table_row = table_row_->global();
    p.act = c_.act;
    if (c_.bias) p.bias = bias_->global();
    if (c_.gate) p.gate = gate_->global();
    if (c_.copies) p.copied = static_cast<int32_t>(c_.y_rows.size());
    conv::gpu::set_widths(p);
    EXPECT(conv::gpu::copies_chunks(p) || !C::kAligned, text(c_));
    return p;
  }

  Report run(uint32_t seed, bool counters = false, unsigned grid = 3) {
    y_->poison();
    const conv::gpu::Problem<T> p = problem();
    Launch launch{.grid = grid, .threads = C::kThreads, .shared = conv::gpu::kSharedBytes<C>, .seed = seed};
    launch.granule = sizeof(T);
    launch.counters = counters;
    launch.resident = seed % 5 == 4 ? 2 : 1;
    return simt::run(launch, [&] { conv::gpu::conv_kernel<C>(p); });
  }

  // Every element of y: the right value stored once, zeros where asked for, everything else untouched. Returns what is
  // wrong.
  std::string compare() {
    if (expected_.empty()) expect();
    std::string wrong;
    for (size_t i = 0; i < expected_.size(); ++i) {
      const Want& want = expected_[i];
      const int stores = y_->stores(static_cast<int64_t>(i));
      const float got = device::to_float(y_->get(static_cast<int64_t>(i)));
      const bool good = want.stores == stores && (stores == 0 || std::fabs(got - want.value) <= want.bound ||
                                                  (!std::isfinite(want.value) && !std::isfinite(got)));
      if (!good && wrong.empty())
        wrong = test::text("y[", i, "] is ", got, " after ", stores, " stores, not ", want.value, " +- ", want.bound,
                           " after ", want.stores);
    }
    return wrong;
  }

  std::vector<T> result() const {
    std::vector<T> all;
    for (size_t i = 0; i < expected_.size() || i < size(); ++i) all.push_back(y_->get(static_cast<int64_t>(i)));
    return all;
  }
  size_t size() const { return static_cast<size_t>(c_.n * oh_ * ow_ * pitch_y_); }
  size_t sample_size() const { return static_cast<size_t>(oh_ * ow_ * pitch_y_); }

 private:
  struct Want {
    int stores = 0;
    double value = 0, bound = 0;
  };

  int draw(int below) { return static_cast<int>(rng_() % static_cast<uint32_t>(below)); }
  float real() { return std::normal_distribution<float>()(rng_); }
  T value() { return device::from_float<T>(c_.values == Values::Integers ? static_cast<float>(draw(7) - 3) : real()); }

  void list(std::optional<Array<int32_t>>& to, const char* name, const std::vector<int>& from) {
    to.emplace(name, std::max<int64_t>(1, static_cast<int64_t>(from.size())));
    for (size_t i = 0; i < from.size(); ++i) to->put(static_cast<int64_t>(i), from[i]);
  }
  void lists() {
    list(x_rows_, "x_rows", c_.x_rows);
    list(y_rows_, "y_rows", c_.y_rows);
    list(count_, "count", {c_.count});
    list(part_count_, "part_count", {static_cast<int>(c_.parts.size())});
    for (int n = 0; n < c_.n; ++n) tables_.push_back(c_.tables > 1 ? draw(c_.tables) : 0);
    list(table_row_, "table_row", tables_);
    part_list_.emplace("parts", std::max<int64_t>(1, static_cast<int64_t>(c_.parts.size())));
    for (size_t i = 0; i < c_.parts.size(); ++i) part_list_->put(static_cast<int64_t>(i), c_.parts[i]);
  }
  int x_row(int entry) const { return c_.x_rows.empty() ? entry : c_.x_rows[static_cast<size_t>(entry)]; }
  int y_row(int entry) const { return c_.y_rows.empty() ? entry : c_.y_rows[static_cast<size_t>(entry)]; }

  template <class F>
  void each_entry(F f) {
    for (const Part& part : parts_)
      for (int i = 0; i < part.count; ++i) f(part, part.first + i);
  }
  int64_t x_at(int n, int y, int x, int c) const { return ((int64_t{1} * n * c_.h + y) * c_.w + x) * pitch_x_ + c; }
  int64_t y_at(int n, int y, int x, int c) const { return ((int64_t{1} * n * oh_ + y) * ow_ + x) * pitch_y_ + c; }
  int64_t w_at(int g, int o, int ky, int kx, int c) const {
    return (((int64_t{1} * g * co_ + o) * c_.kernel + ky) * c_.kernel + kx) * ci_ + c;
  }
  // Permits and fills exactly what the listed samples use.
  void fill() {
    int widest_in = 0, widest_out = 0;
    each_entry([&](const Part& part, int entry) {
      const int xn = x_row(entry), yn = y_row(entry);
      for (int y = 0; y < c_.h; ++y)
        for (int x = 0; x < c_.w; ++x)
          for (int c = 0; c < part.c_in * c_.groups; ++c)
            x_->put(x_at(xn, y, x, c), c_.infinite && (x + c) % 5 == 0 ? device::from_float<T>(INFINITY) : value());
      for (int y = 0; y < oh_; ++y)
        for (int x = 0; x < ow_; ++x) {
          for (int c = 0; c < std::max(part.c_out * c_.groups, c_.zero_to); ++c) y_->output(y_at(yn, y, x, c));
          if (c_.residual)
            for (int c = 0; c < part.c_out * c_.groups; ++c) residual_->put(y_at(yn, y, x, c), value());
        }
      widest_in = std::max(widest_in, part.c_in), widest_out = std::max(widest_out, part.c_out);
    });
    each_copy([&](int64_t i) {
      y_->output(i);
      residual_->put(i, value());
    });
    for (int g = 0; g < c_.groups; ++g)
      for (int o = 0; o < widest_out; ++o)
        for (int k = 0; k < c_.kernel * c_.kernel; ++k)
          for (int c = 0; c < widest_in; ++c) weight_->put(w_at(g, o, k / c_.kernel, k % c_.kernel, c), value());
  }

  // Elements of the samples that only copy their residual.
  template <class F>
  void each_copy(F f) {
    if (!c_.copies) return;
    const int64_t size = static_cast<int64_t>(sample_size());
    for (size_t e = static_cast<size_t>(c_.count); e < c_.y_rows.size(); ++e)
      for (int64_t i = 0; i < size; ++i) f(c_.y_rows[e] * size + i);
  }

  double operand(T value) const {
    const float wide = device::to_float(value);
    return C::kMath == Math::TF32 ? bits_to_float(device::round_tf32(float_to_bits(wide))) : wide;
  }

  static double activated(double v, Act act) {
    switch (act) {
      case Act::Relu:
        return std::max(v, 0.0);
      case Act::Relu6:
        return std::clamp(v, 0.0, 6.0);
      case Act::Hardswish:
        return v * std::clamp(v + 3.0, 0.0, 6.0) / 6.0;
      case Act::Silu:
        return v / (1.0 + std::exp(-v));
      default:
        return v;
    }
  }

  void expect() {
    expected_.assign(size(), {});
    each_entry([&](const Part& part, int entry) {
      const int xn = x_row(entry), yn = y_row(entry);
      const int64_t table = int64_t{1} * tables_[static_cast<size_t>(xn)] * co_ * c_.groups;
      for (int y = 0; y < oh_; ++y)
        for (int x = 0; x < ow_; ++x)
          for (int o = 0; o < std::max(part.c_out * c_.groups, c_.zero_to); ++o) {
            Want& want = expected_[static_cast<size_t>(y_at(yn, y, x, o))];
            ++want.stores;
            if (o < part.c_out * c_.groups) element(part, xn, yn, y, x, o, table + o, want);
          }
    });
    each_copy([&](int64_t i) { expected_[static_cast<size_t>(i)] = {1, device::to_float(residual_->get(i)), 0}; });
  }

  void element(const Part& part, int xn, int yn, int y, int x, int o, int64_t table, Want& want) {
    const int g = o / part.c_out;
    double sum = 0, size = 0;
    for (int ky = 0; ky < c_.kernel; ++ky)
      for (int kx = 0; kx < c_.kernel; ++kx) {
        const int iy = y * c_.stride - c_.pad + ky * c_.dilation, ix = x * c_.stride - c_.pad + kx * c_.dilation;
        if (iy < 0 || iy >= c_.h || ix < 0 || ix >= c_.w) continue;
        for (int c = 0; c < part.c_in; ++c) {
          const double term = operand(x_->get(x_at(xn, iy, ix, g * part.c_in + c))) *
                              operand(weight_->get(w_at(g, o % part.c_out, ky, kx, c)));
          sum += term, size += std::fabs(term);
        }
      }
    if (c_.bias) {
      const double b = bias_->get(int64_t{1} * g * co_ + o % part.c_out);
      sum += b, size += std::fabs(b);
    }
    const double scale = c_.scale ? scale_->get(table) : 1.0;
    sum *= scale, size *= std::fabs(scale);
    if (c_.shift) sum += shift_->get(table), size += std::fabs(shift_->get(table));
    if (c_.residual) {
      const double r = device::to_float(residual_->get(y_at(yn, y, x, o)));
      sum += r, size += std::fabs(r);
    }
    double exact = activated(sum, c_.act);
    if (c_.gate) {
      const double m = gate_->get(yn);
      exact = m * exact + (1 - m) * device::to_float(residual_->get(y_at(yn, y, x, o)));
    }
    want.value = device::to_float(device::from_float<T>(static_cast<float>(exact)));
    // Integers of this size are exact in every format and order. Otherwise: a rounding or truncation each 8 products in
    // the tensor cores (each product in fp32), three in the epilogue, one of the output, slopes up to 1.5.
    const bool curve = c_.act == Act::Hardswish || c_.act == Act::Silu;
    if (c_.values == Values::Integers && !curve) return;
    const double terms = part.c_in * c_.kernel * c_.kernel, u = 0x1p-24;
    const double last = sizeof(T) == 4 ? u : C::kMath == Math::BF16 ? 0x1p-8 : 0x1p-11;
    want.bound =
        (c_.values == Values::Integers ? 8.0 : terms / 2 + 8) * u * 1.5 * size + 2 * last * std::fabs(exact) + 0x1p-24;
  }

  Case c_;
  std::mt19937 rng_;
  int ci_, co_, oh_, ow_, pitch_x_, pitch_y_;
  std::vector<Part> parts_;
  std::vector<int> tables_;
  std::optional<Array<T>> x_, weight_, y_, residual_;
  std::optional<Array<float>> scale_, shift_, bias_, gate_;
  std::optional<Array<int32_t>> x_rows_, y_rows_, count_, part_count_, table_row_;
  std::optional<Array<Part>> part_list_;
  std::vector<Want> expected_;
};

// Runs the case under `seeds` schedules, each of them right in every element and free of faults.
template <class C>
void holds(const Case& c, int seeds = kSchedules, uint32_t first = 0) {
  Run<C> run(c, 1 + first);
  holds_under_schedules(
      text(c), c.values == Values::Normal, first, seeds, [&](uint32_t seed) { return run.run(seed); },
      [&] { return run.compare(); });
}

}  // namespace effkern::test::simt
