#include "dgrad.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "../common/arena.h"
#include "../common/parallel.h"
#include "dgrad_columns.h"

namespace effkern::conv {
namespace {

// One dimension of the convolution that gives the inputs at first, first + stride, ...
struct Phase {
  int64_t size;       // inputs
  int64_t tap, taps;  // first tap that meets them, and how many do, tap_step apart
  int64_t tap_step;
  int64_t dil;
  int64_t pad;  // negative: rows of gy to leave out
};

Phase phase(int64_t first, int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
  // Input i meets output o at tap k where i + pad = o * stride + k * dil.
  const int64_t common = std::gcd(stride, dil);
  Phase p{};
  p.size = first < in ? (in - first - 1) / stride + 1 : 0;
  p.tap_step = stride / common;
  p.dil = dil / common;
  while (p.tap < p.tap_step && (first + pad - p.tap * dil) % stride != 0) ++p.tap;
  if (p.tap == p.tap_step || p.tap >= kernel) return p;  // no tap: the gradient is 0
  p.taps = (kernel - 1 - p.tap) / p.tap_step + 1;
  p.pad = (p.taps - 1) * p.dil - (first + pad - p.tap * dil) / stride;
  return p;
}

// Offsets a view by elements of its dtype.
void shift(Activation& t, int64_t elements) {
  if (t.data != nullptr) t.data = static_cast<char*>(t.data) + elements * dtype_size(t.dtype);
}

void zero(const Activation& gx, int64_t channels, const int64_t* rows, int64_t count) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t y = 0; y < gx.h; ++y) {
        const int64_t line = (rows != nullptr ? rows[i] : i) * gx.sn + y * gx.sh;
        if (gx.sc == 1) {
          for (int64_t x = 0; x < gx.w; ++x)
            std::memset(static_cast<char*>(gx.data) + (line + x * gx.sw) * dtype_size(gx.dtype), 0,
                        static_cast<size_t>(channels * dtype_size(gx.dtype)));
        } else {
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t x = 0; x < gx.w; ++x) store_float(gx.data, gx.dtype, line + c * gx.sc + x * gx.sw, 0.0f);
        }
      }
  };
  if (count * channels * gx.h * gx.w < 1 << 18) return body(0, count);
  parallel_for(0, count, 1, body);
}

// The calling thread's, for the packed weight; thread_arena() belongs to the engine's workers.
Arena& pack_arena() {
  static thread_local Arena arena;
  return arena;
}

void run_phase(const DgradProblem& p, const Activation& gx, const Phase& rows, const Phase& columns) {
  const WeightView& w = p.weight;
  const int64_t c_in = w.groups * w.in_per_group, c_out = w.groups * w.out_per_group;
  Problem q;
  q.algo = p.algo;
  q.x = p.gy;
  q.y = gx;
  // Outputs that no input of this phase reaches on the upper and left side.
  if (rows.pad < 0) q.x.h += rows.pad, shift(q.x, -rows.pad * q.x.sh);
  if (columns.pad < 0) q.x.w += columns.pad, shift(q.x, -columns.pad * q.x.sw);
  if (rows.taps == 0 || columns.taps == 0 || c_out == 0 || q.x.h <= 0 || q.x.w <= 0)
    return zero(gx, c_in, p.gx_rows, p.count);

  WeightView view = w;
  view.out_per_group = w.in_per_group, view.in_per_group = w.out_per_group;
  view.so = w.si, view.si = w.so;
  view.kh = rows.taps, view.kw = columns.taps;
  view.sh = -w.sh * rows.tap_step, view.sw = -w.sw * columns.tap_step;
  const int64_t last = (rows.tap + (rows.taps - 1) * rows.tap_step) * w.sh +
                       (columns.tap + (columns.taps - 1) * columns.tap_step) * w.sw;
  view.data = static_cast<const char*>(w.data) + last * dtype_size(w.dtype);
  const bool depthwise = w.groups > 1 && w.in_per_group == 1 && w.out_per_group == 1;
  const int64_t floats = depthwise ? depthwise_floats(view) : panels_floats(view);
  Arena& arena = pack_arena();
  arena.reset(Arena::bytes(floats, sizeof(float)));
  float* pack = arena.take<float>(floats);
  depthwise ? pack_depthwise(view, pack) : pack_panels(view, pack);
  const ResidentPanels panels(pack, view.out_per_group, view.in_per_group, view.kh * view.kw);

  q.count = p.count;
  q.x_rows = p.gy_rows, q.y_rows = p.gx_rows;
  q.c_in = c_out, q.c_out = c_in;
  q.groups = w.groups;
  q.kh = view.kh, q.kw = view.kw;
  q.pad[0] = std::max<int64_t>(rows.pad, 0), q.pad[1] = std::max<int64_t>(columns.pad, 0);
  q.dil[0] = rows.dil, q.dil[1] = columns.dil;
  if (depthwise)
    q.depthwise = pack, q.depthwise_stride = w.groups;
  else
    q.weight = &panels;
  run(q);
}

}  // namespace

void dgrad(const DgradProblem& p) {
  if (p.count == 0 || p.weight.groups * p.weight.in_per_group == 0) return;
  if (takes_columns(p)) return dgrad_columns(p);
  for (int64_t iy = 0; iy < std::min(p.stride[0], p.gx.h); ++iy) {
    const Phase rows = phase(iy, p.gx.h, p.weight.kh, p.stride[0], p.pad[0], p.dil[0]);
    for (int64_t ix = 0; ix < std::min(p.stride[1], p.gx.w); ++ix) {
      const Phase columns = phase(ix, p.gx.w, p.weight.kw, p.stride[1], p.pad[1], p.dil[1]);
      Activation gx = p.gx;
      shift(gx, iy * gx.sh + ix * gx.sw);
      gx.h = rows.size, gx.w = columns.size;
      gx.sh *= p.stride[0], gx.sw *= p.stride[1];
      run_phase(p, gx, rows, columns);
    }
  }
}

}  // namespace effkern::conv
