#include "dgrad_columns.h"

#include <algorithm>

#include "../common/arena.h"
#include "../common/parallel.h"

namespace effkern::conv {
namespace {

constexpr int64_t kColumns = 1 << 17;      // floats of a task's columns: half a MiB, which stays in L2 or L3
constexpr int64_t kMostColumns = 1 << 20;  // of the rows of gy that one row of gx needs

// The workers' columns, and the calling thread's weight. thread_arena() belongs to the engine.
Arena& column_arena() {
  static thread_local Arena arena;
  return arena;
}
Arena& weight_arena() {
  static thread_local Arena arena;
  return arena;
}

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

class Columns {
 public:
  explicit Columns(const DgradProblem& p)
      : p_(p), w_(p.weight), run_(w_.kw * w_.in_per_group), all_(w_.kh * run_), row_(p.gy.w * all_) {
    // [tap row][tap][input channel] of every output.
    const int64_t floats = w_.out_per_group * all_;
    WeightView view;
    view.out_per_group = all_, view.in_per_group = w_.out_per_group;
    view.so = 1, view.si = all_;
    Arena& arena = weight_arena();
    const int64_t packed = panels_floats(view);
    arena.reset(Arena::bytes(floats, sizeof(float)) + Arena::bytes(packed, sizeof(float)));
    float* matrix = arena.take<float>(floats);
    pack_ = arena.take<float>(packed);
    float* to = matrix;
    for (int64_t o = 0; o < w_.out_per_group; ++o)
      for (int64_t ky = 0; ky < w_.kh; ++ky)
        for (int64_t kx = 0; kx < w_.kw; ++kx)
          for (int64_t i = 0; i < w_.in_per_group; ++i)
            *to++ = load_float(w_.data, w_.dtype, o * w_.so + i * w_.si + ky * w_.sh + kx * w_.sw);
    view.data = matrix;
    pack_panels(view, pack_);
    const int64_t sample = p.gy.h * row_;
    samples_ = std::clamp<int64_t>(kColumns / std::max<int64_t>(sample, 1), 1, p.count);
    rows_ = samples_ > 1 || sample <= kColumns ? p.gx.h : p.stride[0] * std::max<int64_t>(kColumns / row_, 1);
    rows_ = std::max<int64_t>(rows_, 1);
    bands_ = (p.gx.h + rows_ - 1) / rows_;
  }

  int64_t tasks() const { return (p_.count + samples_ - 1) / samples_ * bands_; }

  void operator()(int64_t task) const {
    const int64_t first = task / bands_ * samples_, samples = std::min(samples_, p_.count - first);
    const int64_t top = task % bands_ * rows_, bottom = std::min(top + rows_, p_.gx.h);
    // Rows of gy that these rows of gx meet.
    const int64_t begin = std::max<int64_t>(0, -floor_div((w_.kh - 1) * p_.dil[0] - top - p_.pad[0], p_.stride[0]));
    const int64_t end = std::max(begin, std::min(p_.gy.h, floor_div(bottom - 1 + p_.pad[0], p_.stride[0]) + 1));
    const int64_t floats = samples * (end - begin) * row_, line = p_.gx.w * w_.in_per_group;
    Arena& arena = column_arena();
    arena.reset(Arena::bytes(floats, sizeof(float)) + Arena::bytes(line, sizeof(float)));
    float* columns = arena.take<float>(floats);
    float* sums = arena.take<float>(line);
    if (end > begin) multiply(first, samples, begin, end, columns);
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t y = top; y < bottom; ++y) {
        std::fill_n(sums, line, 0.0f);
        for (int64_t ky = 0; ky < w_.kh; ++ky) {
          const int64_t at = y + p_.pad[0] - ky * p_.dil[0];
          if (at % p_.stride[0] != 0 || at / p_.stride[0] < begin || at < 0 || at / p_.stride[0] >= end) continue;
          add_row(columns + (s * (end - begin) + at / p_.stride[0] - begin) * row_ + ky * run_, sums);
        }
        store(first + s, y, sums);
      }
  }

 private:
  void multiply(int64_t first, int64_t samples, int64_t begin, int64_t end, float* columns) const {
    const ResidentPanels panels(pack_, all_, w_.out_per_group, 1);
    Problem q;
    q.x = p_.gy;
    q.x.h = end - begin;
    q.x.data = static_cast<char*>(p_.gy.data) + begin * p_.gy.sh * dtype_size(p_.gy.dtype);
    if (p_.gy_rows == nullptr) q.x.data = static_cast<char*>(q.x.data) + first * p_.gy.sn * dtype_size(p_.gy.dtype);
    q.x_rows = p_.gy_rows != nullptr ? p_.gy_rows + first : nullptr;
    q.y = {columns, DType::F32, samples, all_, q.x.h, p_.gy.w, q.x.h * row_, 1, row_, all_};
    q.count = samples;
    q.c_in = w_.out_per_group, q.c_out = all_;
    q.weight = &panels;
    run(q, 1);
  }

  // Adds what the taps of one tap row gave at a row of gy.
  void add_row(const float* column, float* sums) const {
    const int64_t channels = w_.in_per_group;
    for (int64_t ox = 0; ox < p_.gy.w; ++ox, column += all_) {
      const int64_t x = ox * p_.stride[1] - p_.pad[1];
      if (p_.dil[1] == 1) {
        const int64_t from = std::clamp<int64_t>(-x, 0, w_.kw), to = std::clamp<int64_t>(p_.gx.w - x, from, w_.kw);
        for (int64_t i = from * channels; i < to * channels; ++i) sums[x * channels + i] += column[i];
        continue;
      }
      for (int64_t kx = 0; kx < w_.kw; ++kx) {
        const int64_t at = x + kx * p_.dil[1];
        if (at < 0 || at >= p_.gx.w) continue;
        for (int64_t i = 0; i < channels; ++i) sums[at * channels + i] += column[kx * channels + i];
      }
    }
  }

  void store(int64_t sample, int64_t y, const float* sums) const {
    const Activation& g = p_.gx;
    const int64_t at = (p_.gx_rows != nullptr ? p_.gx_rows[sample] : sample) * g.sn + y * g.sh, c = w_.in_per_group;
    if (g.dtype == DType::F32 && g.sc == 1 && g.sw == c) {
      std::copy_n(sums, g.w * c, static_cast<float*>(g.data) + at);
      return;
    }
    for (int64_t i = 0; i < c; ++i)
      for (int64_t x = 0; x < g.w; ++x) store_float(g.data, g.dtype, at + i * g.sc + x * g.sw, sums[x * c + i]);
  }

  const DgradProblem& p_;
  const WeightView& w_;
  int64_t run_, all_, row_;  // floats of a tap row, of all taps, and of the columns of a row of gy
  int64_t samples_ = 1, rows_ = 1, bands_ = 1;
  float* pack_;
};

}  // namespace

bool takes_columns(const DgradProblem& p) {
  const WeightView& w = p.weight;
  if (w.groups != 1 || w.out_per_group < 8 || (p.algo != Algo::Auto && p.algo != Algo::Direct)) return false;
  if (w.in_per_group > kPanel / 2 || w.kh > 64 || w.kw > 64) return false;
  // A tap of the engine costs a panel whether its lanes are used or not.
  const int64_t taps = w.kh * w.kw, all = taps * w.in_per_group;
  if (2 * panels_of(all) > taps || p.gy.w == 0 || p.gy.w > kMostColumns) return false;
  return ((w.kh - 1) * p.dil[0] / p.stride[0] + 2) <= kMostColumns / (p.gy.w * all);
}

void dgrad_columns(const DgradProblem& p) {
  const Columns work(p);
  parallel_for(0, work.tasks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

}  // namespace effkern::conv
