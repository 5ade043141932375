// Indirect GEMM: per item a table of row pointers (tap x pixel, a zero row for padding), then panels outside, tiles
// of pixels inside, so that a panel is read from L1/L2 for all pixels of the item.
#include <algorithm>
#include <cstring>

#include "../common/arena.h"
#include "../common/parallel.h"
#include "depthwise.h"
#include "item.h"
#include "ukernel.h"
#include "winograd.h"

namespace effkern::conv {
namespace {

// What the store needs of an output pixel, in elements of the respective tensor.
struct Pixel {
  int64_t y, residual, table;
};
static_assert(sizeof(Pixel) <= 4 * sizeof(int64_t), "plan.cpp sizes the pixel table");

class Worker {
 public:
  Worker(const Problem& p, const Plan& plan, const Kernels& kernels) : p_(p), plan_(plan), k_(kernels) {
    Arena& arena = thread_arena();
    arena.reset(static_cast<size_t>(scratch_bytes(p, plan, kernels.rows)));
    zero_ = arena.take<float>(p.c_in);
    std::memset(zero_, 0, static_cast<size_t>(p.c_in) * sizeof(float));
    const int64_t taps = p.kh * p.kw;
    table_ = arena.take<const float*>((plan.pixels + k_.rows - 1) / k_.rows * k_.rows * taps);
    pixels_ = reinterpret_cast<Pixel*>(arena.take<char>(plan.pixels * 4 * sizeof(int64_t)));
    panel_ = arena.take<float>(p.weight->scratch_floats());
    staged_ = arena.take<float>(stage_floats(p, plan));
  }

  void take(const Item& item) {
    if (plan_.staged) stage(p_, plan_, item, staged_);
    list_pixels(item);
  }

  void run_panel(const PanelPlace& panel) {
    const int64_t taps = p_.kh * p_.kw, in_group = p_.c_in / p_.groups;
    const float* b = p_.weight->panel(panel.group, panel.index, panel_);
    alignas(64) float acc[kMaxRows * kPanel];
    for (int64_t q = 0; q < count_; q += k_.rows) {
      const int64_t n = std::min(k_.rows, count_ - q);
      k_.tile(n, table_ + q * taps, panel.group * in_group, taps, in_group, b, p_.weight->tap_stride, false, acc);
      finish(q, n, panel.channel, panel.cols, acc);
    }
  }

 private:
  // Fills the pixel list and the indirection table [tile][tap][row] of an item.
  void list_pixels(const Item& item) {
    const Activation* residual = p_.epilogue.residual;
    count_ = item.samples * item.rows * p_.y.w;
    int64_t q = 0;
    for (int64_t s = 0; s < item.samples; ++s) {
      const int64_t i = item.first + s;
      const int64_t xn = x_row(p_, i), yn = y_row(p_, i), rn = residual_row(p_, i);
      const int64_t table = p_.epilogue.table_row != nullptr ? p_.epilogue.table_row[xn] * p_.epilogue.table_stride : 0;
      const Image image = image_of(p_, plan_, item, s, staged_);
      for (int64_t oy = item.row; oy < item.row + item.rows; ++oy, q += p_.y.w) {
        for (int64_t ox = 0; ox < p_.y.w; ++ox) {
          Pixel& pixel = pixels_[q + ox];
          pixel.y = yn * p_.y.sn + oy * p_.y.sh + ox * p_.y.sw;
          pixel.residual = residual != nullptr ? rn * residual->sn + oy * residual->sh + ox * residual->sw : 0;
          pixel.table = table;
        }
        list_line(image, oy, q);
      }
    }
  }

  // The table's entries for one line of output pixels, of which the first is pixel q of the item.
  void list_line(const Image& image, int64_t oy, int64_t q) {
    const int64_t taps = p_.kh * p_.kw;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t iy = oy * p_.stride[0] - p_.pad[0] + tap / p_.kw * p_.dil[0];
      const int64_t ix0 = tap % p_.kw * p_.dil[1] - p_.pad[1];  // input column of output column 0
      const bool inside = iy >= 0 && iy < p_.x.h;
      const float* line = image.data + (iy - image.top) * image.row_pitch;
      int64_t r = q % k_.rows;
      const float** entry = table_ + (q / k_.rows * taps + tap) * k_.rows;
      for (int64_t ox = 0, ix = ix0; ox < p_.y.w; ++ox, ix += p_.stride[1]) {
        entry[r] = inside && ix >= 0 && ix < p_.x.w ? line + ix * image.pixel_pitch : zero_;
        if (++r == k_.rows) {
          r = 0;
          entry += taps * k_.rows;
        }
      }
    }
  }

  void finish(int64_t q, int64_t n, int64_t channel, int64_t cols, const float* acc) {
    const Epilogue& e = p_.epilogue;
    Store s = store_of(p_, cols);
    s.rows = n;
    const int64_t table = pixels_[q].table;
    for (int64_t r = 0; r < n; ++r) {
      const Pixel& pixel = pixels_[q + r];
      s.y[r] = const_cast<char*>(at(p_.y, pixel.y + channel * p_.y.sc));
      s.residual[r] = s.has_residual ? at(*e.residual, pixel.residual + channel * e.residual->sc) : nullptr;
      s.one_table = s.one_table && pixel.table == table;
    }
    for (int64_t r = 0; r < (s.one_table ? 1 : n); ++r) {
      s.scale[r] = e.scale != nullptr ? e.scale + pixels_[q + r].table + channel : nullptr;
      s.shift[r] = e.shift != nullptr ? e.shift + pixels_[q + r].table + channel : nullptr;
    }
    k_.store(s, acc);
  }

  const Problem& p_;
  const Plan& plan_;
  const Kernels& k_;
  int64_t count_ = 0;
  float *zero_, *panel_, *staged_;
  const float** table_;
  Pixel* pixels_;
};

}  // namespace

void run(const Problem& p, int64_t threads) {
  if (p.depthwise != nullptr) return run_depthwise(p, threads);
  if (p.count == 0 || p.c_out == 0 || p.y.h == 0 || p.y.w == 0) return;
  if (threads == 0) threads = is_small(p) ? 1 : num_threads();
  const Plan plan = make_plan(p, threads);
  const Kernels& k = kernels(isa());
  const auto body = [&](int64_t begin, int64_t end) {
    if (plan.form != nullptr) return run_winograd(p, plan, k, begin, end);
    Worker work(p, plan, k);
    walk(p, plan, begin, end, work);
  };
  if (threads == 1)
    body(0, plan.items * plan.panel_splits);
  else
    parallel_for(0, plan.items * plan.panel_splits, 1, body);
}

}  // namespace effkern::conv
