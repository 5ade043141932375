#include "dw_pw.h"

#include <cstring>
#include <optional>

#include "../common/parallel.h"
#include "depthwise.h"
#include "item.h"
#include "plan.h"

namespace effkern::conv {
namespace {

// Of an L2 of 512 KiB: the rows between two convolutions, or among all three. The rest is for the input's rows and
// panels of weights.
constexpr int64_t kStripBytes = 192 * 1024, kBothBytes = 320 * 1024;
// Maps that stay in an L2 between two convolutions need not be cut.
constexpr int64_t kMapBytes = 512 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Floats from a pixel of a strip to the next: never a multiple of 2 KiB, where the rows of a tile would fall into one
// set of the L1 cache.
int64_t strip_pitch(const Problem& dw) { return dw.c_out % 512 == 0 ? dw.c_out + kPanel : dw.c_out; }

// Input rows of the depthwise convolution from the first to the last that one row of outputs reads.
int64_t reach(const Problem& dw) { return (dw.kh - 1) * dw.dil[0] + 1; }

// Input rows that a row of outputs reads and the next one reads again.
int64_t shared_rows(const Problem& dw) { return std::max<int64_t>(reach(dw) - dw.stride[0], 0); }

struct Bands {
  int64_t rows, count;
};

// Bands that fit the strips, as many as share evenly among the threads where the rows allow.
Bands bands_of(const Problem* front, const Problem& dw, int64_t threads) {
  const int64_t pixel = strip_pitch(dw) * 4, row_bytes = std::max<int64_t>(dw.y.w * pixel, 1);
  int64_t fit = kStripBytes / row_bytes;
  if (front != nullptr)
    fit = (kBothBytes - shared_rows(dw) * dw.x.w * pixel) /
          std::max<int64_t>(row_bytes + dw.stride[0] * dw.x.w * pixel, 1);
  int64_t bands = ceil_div(dw.y.h, std::clamp<int64_t>(fit, 1, dw.y.h));
  if (bands * dw.count < 4 * threads)
    bands = ceil_div(bands * dw.count, threads) * threads / std::max<int64_t>(dw.count, 1);
  const int64_t rows = ceil_div(dw.y.h, std::clamp<int64_t>(bands, 1, dw.y.h));
  return {rows, ceil_div(dw.y.h, rows)};
}

int64_t threads_of(const Problem* front, const Problem& pw) {
  return is_small(pw) && (front == nullptr || is_small(*front)) ? 1 : num_threads();
}

// A tensor seen from one band of one of its samples.
Activation band_of(const Activation& t, int64_t sample, int64_t row, int64_t rows) {
  Activation band = t;
  band.data = const_cast<char*>(at(t, sample * t.sn + row * t.sh));
  band.n = 1, band.h = rows;
  return band;
}

// A strip of `rows` rows of a map of fp32 at `data`.
Activation strip_of(const Activation& map, int64_t channels, int64_t rows, int64_t pitch, float* data) {
  Activation strip = map;
  strip.data = data;
  strip.dtype = DType::F32;
  strip.n = 1, strip.c = channels, strip.h = rows;
  strip.sn = 0, strip.sc = 1, strip.sw = pitch, strip.sh = pitch * map.w;
  return strip;
}

// Rows [begin, end) of a convolution's output for a sample, to a strip that begins with row `begin`.
void run_rows(const Problem& p, int64_t sample, int64_t begin, int64_t end, const Activation& to) {
  Problem part = p;
  const int64_t first = begin * p.stride[0] - p.pad[0], top = std::clamp<int64_t>(first, 0, p.x.h);
  part.algo = Algo::Direct;
  part.x = band_of(p.x, sample, top, p.x.h - top);
  part.pad[0] = top - first;
  part.y = to;
  part.y.h = end - begin;
  part.count = 1;
  run(part, 1);
}

// The rows of the first convolution's output that the depthwise one reads, kept from band to band of a sample.
class Front {
 public:
  static size_t bytes(const Problem& dw, int64_t rows) {
    return Arena::bytes(most_rows(dw, rows) * dw.x.w * strip_pitch(dw), sizeof(float));
  }
  Front(const Problem& front, const Problem& dw, int64_t rows, Arena& arena)
      : front_(front), dw_(dw), row_(dw.x.w * strip_pitch(dw)), data_(arena.take<float>(most_rows(dw, rows) * row_)) {}
  Activation strip() const { return strip_of(dw_.x, dw_.c_in, 0, strip_pitch(dw_), data_); }

  // Makes the rows that output rows [row, row + rows) read, and lets `filter` see them as its whole input.
  void operator()(int64_t sample, int64_t row, int64_t rows, Problem& filter) {
    const int64_t first = row * dw_.stride[0] - dw_.pad[0];
    const int64_t top = std::clamp<int64_t>(first, 0, dw_.x.h);
    const int64_t end = std::clamp<int64_t>(first + (rows - 1) * dw_.stride[0] + reach(dw_), top, dw_.x.h);
    const int64_t kept = sample == sample_ && top >= top_ ? std::max<int64_t>(end_ - top, 0) : 0;
    if (kept > 0) std::memmove(data_, data_ + (top - top_) * row_, static_cast<size_t>(kept * row_) * sizeof(float));
    if (top + kept < end) {
      Activation to = strip();
      to.data = data_ + kept * row_;
      run_rows(front_, sample, top + kept, end, to);
    }
    sample_ = sample, top_ = top, end_ = end;
    filter.x.h = end - top;
    filter.pad[0] = top - first;
  }

 private:
  static int64_t most_rows(const Problem& dw, int64_t rows) {
    return std::min(dw.x.h, (rows - 1) * dw.stride[0] + reach(dw));
  }
  const Problem &front_, &dw_;
  const int64_t row_;  // floats
  float* data_;
  int64_t sample_ = -1, top_ = 0, end_ = 0;  // what lies at data_
};

// The arena of the strip: the pointwise convolution takes its scratch from the thread's own.
Arena& strip_arena() {
  static thread_local Arena arena;
  return arena;
}

// The rows of the busiest thread against an even share: whole maps are cut finer by output panels, in several passes.
bool is_even(const Bands& bands, const Problem& dw, int64_t threads) {
  const int64_t busiest = ceil_div(bands.count * dw.count, threads) * bands.rows;
  return 10 * threads * busiest <= 11 * dw.y.h * dw.count;
}

// Units [begin, end) of (sample, band).
void run_bands(const Problem* front, const Problem& dw, const Problem& pw, const Bands& bands, int64_t begin,
               int64_t end) {
  const int64_t pitch = strip_pitch(dw);
  Arena& arena = strip_arena();
  arena.reset(Arena::bytes(bands.rows * dw.y.w * pitch, sizeof(float)) +
              (front != nullptr ? Front::bytes(dw, bands.rows) : 0) +
              DepthwiseRows::scratch_bytes(dw, bands.rows, dw.c_out));
  const Activation strip = strip_of(dw.y, dw.c_out, bands.rows, pitch, arena.take<float>(bands.rows * dw.y.w * pitch));
  Problem filter = dw;
  std::optional<Front> before;
  if (front != nullptr) {
    before.emplace(*front, dw, bands.rows, arena);
    filter.x = before->strip();
  }
  DepthwiseRows run_filter(filter, bands.rows, dw.c_out, arena);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / bands.count, row = i % bands.count * bands.rows,
                  rows = std::min(bands.rows, dw.y.h - row);
    if (before) {
      (*before)(sample, row, rows, filter);
      run_filter({0, 0, rows, 0, dw.c_out}, {strip, 0, 0});
    } else {
      run_filter({sample, row, rows, 0, dw.c_out}, {strip, 0, row});
    }
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
}

void run_all(const Problem* front, const Problem& dw, const Problem& pw, int64_t threads) {
  if (pw.count == 0 || pw.c_out == 0 || pw.y.h == 0 || pw.y.w == 0) return;
  if (threads == 0) threads = threads_of(front, pw);
  const Bands bands = bands_of(front, dw, threads);
  if (threads == 1) return run_bands(front, dw, pw, bands, 0, pw.count * bands.count);
  parallel_for(0, pw.count * bands.count, 1,
               [&](int64_t begin, int64_t end) { run_bands(front, dw, pw, bands, begin, end); });
}

}  // namespace

bool can_fuse(const Problem& dw, const Problem& pw, int64_t threads) {
  if (dw.depthwise == nullptr || !is_plain(dw.x) || !is_plain(pw.y) || dw.y.h == 0) return false;
  if (threads == 0) threads = threads_of(nullptr, pw);
  return is_even(bands_of(nullptr, dw, threads), dw, threads);
}

bool can_fuse(const Problem& front, const Problem& dw, const Problem& pw) {
  const Activation& map = front.y;
  if (dw.depthwise == nullptr || front.depthwise != nullptr || !is_plain(pw.y) || dw.y.h == 0 ||
      map.dtype != DType::F32)
    return false;
  for (const Problem* p : {&front, &dw, &pw})
    if (p->x_rows != nullptr || p->y_rows != nullptr || p->epilogue.table_row != nullptr ||
        p->epilogue.residual_rows != nullptr)
      return false;
  if (front.epilogue.residual != nullptr || dw.epilogue.residual != nullptr || winograd_form(front) != nullptr ||
      map.h * map.w * front.c_out * 4 < kMapBytes)
    return false;
  const int64_t threads = threads_of(&front, pw);
  // Where a thread begins within a sample it makes rows again.
  return is_even(bands_of(&front, dw, threads), dw, threads) &&
         10 * (threads - 1) * shared_rows(dw) <= dw.x.h * dw.count;
}

void run_fused(const Problem& dw, const Problem& pw, int64_t threads) { run_all(nullptr, dw, pw, threads); }

void run_fused(const Problem& front, const Problem& dw, const Problem& pw) { run_all(&front, dw, pw, 0); }

Step fused_step(const Problem* front, const Problem& dw, const Problem& pw, int64_t threads) {
  if (pw.count == 0 || pw.c_out == 0 || pw.y.h == 0 || pw.y.w == 0) return {};
  const Bands bands = bands_of(front, dw, threads);
  const auto body = [front, &dw, &pw, bands](int64_t begin, int64_t end) {
    run_bands(front, dw, pw, bands, begin, end);
  };
  // Each piece makes the rows again that it shares with the one before.
  return {pw.count * bands.count, body, front != nullptr ? 1 : kPieces};
}

}  // namespace effkern::conv
