#include "dw_pw.h"

#include "../common/parallel.h"
#include "depthwise.h"
#include "item.h"

namespace effkern::conv {
namespace {

constexpr int64_t kStripBytes = 192 * 1024;  // of an L2 of 512 KiB; the rest is for the input's rows and a weight panel

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Floats from a pixel of the strip to the next: never a multiple of 2 KiB, where the rows of a tile would fall into one
// set of the L1 cache.
int64_t strip_pitch(const Problem& dw) { return dw.c_out % 512 == 0 ? dw.c_out + kPanel : dw.c_out; }

struct Bands {
  int64_t rows, count;
};

// Bands that fit the strip, as many as share evenly among the threads where the rows allow.
Bands bands_of(const Problem& dw, int64_t threads) {
  const int64_t row_bytes = std::max<int64_t>(dw.y.w * strip_pitch(dw) * 4, 1);
  int64_t bands = ceil_div(dw.y.h, std::clamp<int64_t>(kStripBytes / row_bytes, 1, dw.y.h));
  if (bands * dw.count < 4 * threads)
    bands = ceil_div(bands * dw.count, threads) * threads / std::max<int64_t>(dw.count, 1);
  const int64_t rows = ceil_div(dw.y.h, std::clamp<int64_t>(bands, 1, dw.y.h));
  return {rows, ceil_div(dw.y.h, rows)};
}

// A tensor seen from one band of one of its samples.
Activation band_of(const Activation& t, int64_t sample, int64_t row, int64_t rows) {
  Activation band = t;
  band.data = const_cast<char*>(at(t, sample * t.sn + row * t.sh));
  band.n = 1, band.h = rows;
  return band;
}

// The arena of the strip: the pointwise convolution takes its scratch from the thread's own.
Arena& strip_arena() {
  static thread_local Arena arena;
  return arena;
}

}  // namespace

bool can_fuse(const Problem& dw, const Problem& pw) {
  if (dw.depthwise == nullptr || !is_plain(dw.x) || !is_plain(pw.y) || dw.y.h == 0) return false;
  const int64_t threads = is_small(pw) ? 1 : num_threads();
  const Bands bands = bands_of(dw, threads);
  // The rows of the busiest thread against an even share: whole maps are cut finer by output panels, in two passes.
  const int64_t busiest = ceil_div(bands.count * dw.count, threads) * bands.rows;
  return 10 * threads * busiest <= 11 * dw.y.h * dw.count;
}

void run_fused(const Problem& dw, const Problem& pw) {
  if (pw.count == 0 || pw.c_out == 0 || pw.y.h == 0 || pw.y.w == 0) return;
  const int64_t threads = is_small(pw) ? 1 : num_threads(), pitch = strip_pitch(dw);
  const Bands bands = bands_of(dw, threads);
  const auto body = [&](int64_t begin, int64_t end) {
    Arena& arena = strip_arena();
    arena.reset(Arena::bytes(bands.rows * dw.y.w * pitch, sizeof(float)) +
                DepthwiseRows::scratch_bytes(dw, bands.rows, dw.c_out));
    Activation strip = dw.y;
    strip.data = arena.take<float>(bands.rows * dw.y.w * pitch);
    strip.dtype = DType::F32;
    strip.n = 1, strip.c = dw.c_out, strip.h = bands.rows;
    strip.sn = 0, strip.sc = 1, strip.sw = pitch, strip.sh = pitch * dw.y.w;
    DepthwiseRows filter(dw, bands.rows, dw.c_out, arena);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / bands.count, row = i % bands.count * bands.rows,
                    rows = std::min(bands.rows, dw.y.h - row);
      filter({sample, row, rows, 0, dw.c_out}, {strip, 0, row});
      Problem part = pw;
      part.x = strip;
      part.x.h = rows;
      part.y = band_of(pw.y, y_row(pw, sample), row, rows);
      part.count = 1;
      part.x_rows = part.y_rows = part.epilogue.residual_rows = nullptr;
      Epilogue& e = part.epilogue;
      Activation residual;
      if (e.residual != nullptr) {
        residual = band_of(*e.residual, residual_row(pw, sample), row, rows);
        e.residual = &residual;
      }
      if (e.table_row != nullptr) {
        const int64_t table = e.table_row[x_row(dw, sample)] * e.table_stride;
        if (e.scale != nullptr) e.scale += table;
        if (e.shift != nullptr) e.shift += table;
        e.table_row = nullptr;
      }
      run(part, 1);
    }
  };
  if (threads == 1)
    body(0, pw.count * bands.count);
  else
    parallel_for(0, pw.count * bands.count, 1, body);
}

}  // namespace effkern::conv
