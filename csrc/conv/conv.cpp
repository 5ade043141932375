// Indirect GEMM: per item a table of row pointers (tap x pixel, a zero row for padding), then panels outside, parts of
// a panel's sum inside, tiles of pixels inside those: a part of the weights is read from L1 for all pixels of the item.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../common/arena.h"
#include "../common/parallel.h"
#include "depthwise.h"
#include "item.h"
#include "ukernel.h"
#include "winograd.h"

namespace effkern::conv {
namespace {

class Worker {
 public:
  Worker(const Problem& p, const Plan& plan, const Kernels& kernels)
      : p_(p), plan_(plan), k_(kernels), rows_(kernels.gemm.rows), resident_(p.weight->scratch_floats() == 0) {
    Arena& arena = thread_arena();
    arena.reset(static_cast<size_t>(scratch_bytes(p, plan, kernels.gemm.rows)));
    const int64_t zeros = zero_floats(p, plan);
    zero_ = arena.take<float>(zeros);
    std::memset(zero_, 0, static_cast<size_t>(zeros) * sizeof(float));
    table_ = arena.take<const float*>((plan.pixels + rows_ - 1) / rows_ * rows_ * plan.taps);
    y_ = arena.take<void*>(plan.pixels);
    residual_ = arena.take<const void*>(plan.pixels);
    row_ = arena.take<int64_t>(plan.pixels);
    sums_ = arena.take<float>(plan.pixels * kMaxCols);
    panel_ = arena.take<float>(p.weight->scratch_floats());
    staged_ = arena.take<float>(stage_floats(p, plan));
    const Activation* residual = p.epilogue.residual;
    plain_ = p.y.dtype == DType::F32 && p.y.sc == 1 &&
             (residual == nullptr || (residual->dtype == DType::F32 && residual->sc == 1));
  }

  void take(const Item& item) {
    if (plan_.staged) stage(p_, plan_, item, staged_);
    count_ = item.samples * item.rows * p_.y.w;
    run_ = run_of(item);
    // Even tiles: one of a few rows would wait for the latency of its sums.
    const int64_t pixels = run_ > 0 ? run_ : count_;
    height_ = (pixels - 1) / ((pixels + rows_ - 1) / rows_) + 1;
    if (run_ > 0) return list_runs(item);
    run_ = height_;
    list_pixels(item);
  }

  // Side by side where the kernels take two panels and both lie in the pack.
  void run_panels(int64_t first, int64_t end) {
    for (int64_t i = first; i < end;) {
      PanelPlace panel = panel_at(p_, i++);
      for (int64_t n = 1; n < k_.gemm.panels && resident_ && i < end; ++n, ++i) {
        const PanelPlace next = panel_at(p_, i);
        if (next.group != panel.group) break;
        panel.cols += next.cols;
      }
      run_panel(panel, resident_ && i < end ? i : -1);
    }
  }

 private:
  // `next` is the panel that follows, or -1: what of it is in no near cache is fetched meanwhile.
  void run_panel(const PanelPlace& panel, int64_t next) {
    const float* b = p_.weight->panel(panel.group, panel.index, panel_);
    const PanelPlace then = next >= 0 ? panel_at(p_, next) : panel;
    const float* ahead = next >= 0 ? p_.weight->panel(then.group, then.index, nullptr) : b;
    alignas(64) float scale[kMaxCols], shift[kMaxCols];
    GemmTile t = tile_of(panel, scale, shift);
    for (int64_t tap = 0; tap < plan_.taps; tap += plan_.part_taps) {
      t.taps = std::min(plan_.part_taps, plan_.taps - tap);
      for (int64_t k = 0; k == 0 || k < plan_.depth; k += plan_.part_depth) {
        t.k = std::min(plan_.part_depth, plan_.depth - k);
        const int64_t part = tap * t.tap_stride + k * kPanel;
        t.b = b + part;
        t.ahead = ahead + part;
        t.more = tap > 0 || k > 0;
        t.last = straight_ && k + t.k == plan_.depth && tap + t.taps == plan_.taps;
        run_tiles(t, table_ + tap * rows_, panel.group * plan_.depth + k, panel.channel);
      }
    }
    if (!straight_)
      for (int64_t q = 0; q < count_; q += height_)
        for (int64_t c = 0; c < panel.cols; c += kPanel)
          finish(q, std::min(height_, count_ - q), panel.channel + c, std::min(kPanel, panel.cols - c), c);
  }

  // What all tiles of a panel share.
  GemmTile tile_of(const PanelPlace& panel, float* scale, float* shift) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Epilogue& e = p_.epilogue;
    const int64_t from = row_[0] + panel.channel;
    for (int64_t i = 0; i < kMaxCols; ++i) {
      scale[i] = e.scale != nullptr && i < panel.cols ? e.scale[from + i] : 1.0f;
      shift[i] = e.shift != nullptr && i < panel.cols ? e.shift[from + i] : 0.0f;
    }
    GemmTile t;
    t.tap_stride = plan_.joined ? plan_.depth * kPanel : p_.weight->tap_stride;
    t.panel_stride = p_.kh * p_.kw * p_.weight->tap_stride;
    t.cols = panel.cols;
    t.scale = scale;
    t.shift = shift;
    t.low = e.act == Act::Relu || e.act == Act::Relu6 ? 0.0f : -kInfinity;
    t.high = e.act == Act::Relu6 ? 6.0f : kInfinity;
    t.curved = e.act == Act::Hardswish || e.act == Act::Silu;
    t.act = e.act;
    t.fetch = plan_.far;
    return t;
  }

  // One part of the sums of all pixels.
  void run_tiles(GemmTile& t, const float* const* a, int64_t a_offset, int64_t channel) {
    const bool residual = p_.epilogue.residual != nullptr;
    t.a = a, t.y = y_, t.residual = residual ? residual_ : nullptr;
    for (int64_t q = 0; q < count_; q += run_) {
      const int64_t end = std::min(run_, count_ - q);
      for (int64_t i = 0; i < end; i += height_) {
        t.rows = std::min(height_, end - i);
        t.sums = sums_ + (q + i) * kMaxCols;
        t.a_offset = a_offset + i * x_step_;
        t.y_offset = channel + i * y_step_;
        t.residual_offset = channel + i * residual_step_;
        k_.gemm.tile(t);
        // The first tile fetched a panel ahead, the second fetches the one behind it.
        t.ahead = q + i == 0 && t.cols > kPanel && t.ahead != t.b ? t.ahead + t.panel_stride : t.b;
      }
      t.a += plan_.taps * rows_;
      t.y += height_;
      if (residual) t.residual += height_;
    }
  }

  // Pixels of a run: one behind the other at even distances in x, y and the residual, so that the lists of its first
  // tile serve them all. 0 if there are none such in the item.
  int64_t run_of(const Item& item) const {
    const Activation &x = p_.x, &y = p_.y, *residual = p_.epilogue.residual;
    if (!plain_ || (item.samples > 1 && p_.epilogue.table_row != nullptr)) return 0;
    const int64_t line = y.w >= 2 * rows_ - 2 ? y.w : 0;  // shorter ones would end in tiles of few rows
    if (plan_.joined) return line;
    if (p_.kh != 1 || p_.kw != 1 || p_.pad[0] != 0 || p_.pad[1] != 0) return 0;
    // The phases of an input gradient may reach past x, to the right and below, where it counts as zero.
    if ((y.h - 1) * p_.stride[0] >= x.h || (y.w - 1) * p_.stride[1] >= x.w) return 0;
    const bool whole = y.w == x.w && p_.stride[0] == 1 && p_.stride[1] == 1 && (plan_.staged || x.sh == x.w * x.sw) &&
                       y.sh == y.w * y.sw && (residual == nullptr || residual->sh == residual->w * residual->sw);
    return whole && item.samples == 1 ? count_ : line;
  }

  // As list_pixels, for the first tile of every run.
  void list_runs(const Item& item) {
    const Activation* residual = p_.epilogue.residual;
    straight_ = true;
    const int64_t lines = run_ == count_ ? 1 : item.rows;
    const int64_t columns = plan_.taps / p_.kh, left = plan_.joined ? p_.pad[1] : 0;
    y_step_ = p_.y.sw, residual_step_ = residual != nullptr ? residual->sw : 0;
    int64_t run = 0;
    for (int64_t s = 0; s < item.samples; ++s) {
      const int64_t i = item.first + s;
      const int64_t xn = x_row(p_, i), yn = y_row(p_, i), rn = residual_row(p_, i);
      row_[0] = p_.epilogue.table_row != nullptr ? p_.epilogue.table_row[xn] * p_.epilogue.table_stride : 0;
      const Image image = image_of(p_, plan_, item, s, staged_);
      x_step_ = p_.stride[1] * image.pixel_pitch;
      for (int64_t oy = item.row; oy < item.row + lines; ++oy, ++run) {
        list_addresses(p_.y, yn * p_.y.sn + oy * p_.y.sh, height_, y_ + run * height_);
        if (residual != nullptr)
          list_addresses(*residual, rn * residual->sn + oy * residual->sh, height_, residual_ + run * height_);
        for (int64_t tap = 0; tap < plan_.taps; ++tap) {
          const int64_t iy = oy * p_.stride[0] - p_.pad[0] + tap / columns * p_.dil[0];
          const bool inside = iy >= 0 && iy < p_.x.h;
          const float* line =
              inside ? image.data + (iy - image.top) * image.row_pitch - left * image.pixel_pitch : zero_;
          const float** entry = table_ + (run * plan_.taps + tap) * rows_;
          for (int64_t r = 0; r < height_; ++r) entry[r] = line + r * x_step_;
        }
      }
    }
  }

  // Fills the lists of pixels and the indirection table [tile][tap][row] of an item.
  void list_pixels(const Item& item) {
    const Activation* residual = p_.epilogue.residual;
    straight_ = plain_;
    x_step_ = y_step_ = residual_step_ = 0;  // every tile has its lists
    int64_t q = 0;
    for (int64_t s = 0; s < item.samples; ++s) {
      const int64_t i = item.first + s;
      const int64_t xn = x_row(p_, i), yn = y_row(p_, i), rn = residual_row(p_, i);
      const int64_t row = p_.epilogue.table_row != nullptr ? p_.epilogue.table_row[xn] * p_.epilogue.table_stride : 0;
      const Image image = image_of(p_, plan_, item, s, staged_);
      for (int64_t oy = item.row; oy < item.row + item.rows; ++oy, q += p_.y.w) {
        list_addresses(p_.y, yn * p_.y.sn + oy * p_.y.sh, p_.y.w, y_ + q);
        if (residual != nullptr)
          list_addresses(*residual, rn * residual->sn + oy * residual->sh, p_.y.w, residual_ + q);
        std::fill_n(row_ + q, p_.y.w, row);
        list_line(image, oy, q);
      }
      straight_ = straight_ && row == row_[0];
    }
  }

  // The addresses of a line of output pixels in y or the residual; the first is `element`.
  template <class Pointer>
  static void list_addresses(const Activation& t, int64_t element, int64_t pixels, Pointer* out) {
    char* pixel = const_cast<char*>(at(t, element));
    const int64_t step = t.sw * dtype_size(t.dtype);
    for (int64_t ox = 0; ox < pixels; ++ox) out[ox] = pixel + ox * step;
  }

  // The table's entries for one line of output pixels, of which the first is pixel q of the item.
  void list_line(const Image& image, int64_t oy, int64_t q) {
    const int64_t columns = plan_.taps / p_.kh, left = plan_.joined ? p_.pad[1] : 0;
    const int64_t width = plan_.joined ? plan_.stage_width : p_.x.w;
    for (int64_t tap = 0; tap < plan_.taps; ++tap) {
      const int64_t iy = oy * p_.stride[0] - p_.pad[0] + tap / columns * p_.dil[0];
      const int64_t ix0 = tap % columns * p_.dil[1] - p_.pad[1] + left;  // input column of output column 0
      const bool inside = iy >= 0 && iy < p_.x.h;
      const float* line = image.data + (iy - image.top) * image.row_pitch - left * image.pixel_pitch;
      int64_t r = q % height_;
      const float** entry = table_ + (q / height_ * plan_.taps + tap) * rows_;
      for (int64_t ox = 0, ix = ix0; ox < p_.y.w; ++ox, ix += p_.stride[1]) {
        entry[r] = inside && ix >= 0 && ix < width ? line + ix * image.pixel_pitch : zero_;
        if (++r == height_) {
          r = 0;
          entry += plan_.taps * rows_;
        }
      }
    }
  }

  // The general store, of finished sums.
  void finish(int64_t q, int64_t n, int64_t channel, int64_t cols, int64_t from) {
    const Epilogue& e = p_.epilogue;
    Store s = store_of(p_, cols);
    s.rows = n;
    const auto offset = [&](const Activation& t) { return channel * t.sc * dtype_size(t.dtype); };
    for (int64_t r = 0; r < n; ++r) {
      s.y[r] = static_cast<char*>(y_[q + r]) + offset(p_.y);
      s.residual[r] = s.has_residual ? static_cast<const char*>(residual_[q + r]) + offset(*e.residual) : nullptr;
      s.one_table = s.one_table && row_[q + r] == row_[q];
    }
    for (int64_t r = 0; r < (s.one_table ? 1 : n); ++r) {
      s.scale[r] = e.scale != nullptr ? e.scale + row_[q + r] + channel : nullptr;
      s.shift[r] = e.shift != nullptr ? e.shift + row_[q + r] + channel : nullptr;
    }
    float c[kMaxRows * kPanel];
    for (int64_t r = 0; r < n; ++r) std::copy_n(sums_ + (q + r) * kMaxCols + from, kPanel, c + r * kPanel);
    k_.store(s, c);
  }

  const Problem& p_;
  const Plan& plan_;
  const Kernels& k_;
  const int64_t rows_;                                   // pixels of a tile at most, and the pitch of the table
  const bool resident_;                                  // panels lie one after the other in a pack
  int64_t count_ = 0, height_ = 1;                       // pixels of the item, and of a tile
  int64_t run_ = 1;                                      // pixels that one tile's lists serve
  int64_t x_step_ = 0, y_step_ = 0, residual_step_ = 0;  // floats from one of them to the next
  bool plain_, straight_ = false;  // y and residual are fp32, channels side by side; and one table row serves all
  float *zero_, *panel_, *staged_, *sums_;
  const float** table_;
  void** y_;
  const void** residual_;
  int64_t* row_;
};

void run_units(const Problem& p, const Plan& plan, int64_t begin, int64_t end) {
  const Kernels& k = kernels(isa());
  if (plan.form != nullptr) return run_winograd(p, plan, k, begin, end);
  Worker work(p, plan, k);
  walk(p, plan, begin, end, work);
}

bool is_empty(const Problem& p) { return p.count == 0 || p.c_out == 0 || p.y.h == 0 || p.y.w == 0; }

}  // namespace

void run(const Problem& p, int64_t threads) {
  if (is_empty(p)) return;
  if (threads == 0) threads = is_small(p) ? 1 : num_threads();
  if (p.depthwise != nullptr) return run_depthwise(p, threads);
  const Plan plan = make_plan(p, threads);
  const int64_t units = plan.items * plan.panel_splits;
  if (threads == 1) return run_units(p, plan, 0, units);
  parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { run_units(p, plan, begin, end); });
}

Step step_of(const Problem& p, int64_t threads) {
  if (is_empty(p)) return {};
  if (p.depthwise != nullptr) return depthwise_step(p, threads);
  const Plan plan = make_plan(p, threads);
  return {plan.items * plan.panel_splits, [&p, plan](int64_t begin, int64_t end) { run_units(p, plan, begin, end); }};
}

}  // namespace effkern::conv
