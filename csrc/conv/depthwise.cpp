#include "depthwise.h"

#include <limits>

#include "../common/parallel.h"
#include "item.h"

namespace effkern::conv {
namespace {

constexpr int64_t kMaxTile = kDepthwiseRows * kDepthwiseMaxCols;
constexpr int64_t kChunk = 256;              // channels at a time where outputs or residuals go through scratch
constexpr int64_t kStageBytes = 192 * 1024;  // less than half of a 512 KiB L2
constexpr int64_t kCacheBytes = 16 << 20;    // half of a 32 MiB L3
constexpr int64_t kHalfPage = 2048 / 4;
constexpr int64_t kItemsPerThread = 8;  // so that no thread waits long for another's last item

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Input rows that `rows` output rows need at most.
int64_t input_rows(const Problem& p, int64_t rows) {
  return std::min(p.x.h, (rows - 1) * p.stride[0] + (p.kh - 1) * p.dil[0] + 1);
}

// Pixels a multiple of 2 KiB apart fall into two sets of the L1 cache, where those of a tile push each other out: a
// band is then copied to another pitch first.
bool is_aliased(const Problem& p) { return is_plain(p.x) && p.x.sw % kHalfPage == 0 && !DepthwiseRows::sweeps(p); }

bool is_staged(const Problem& p) { return !is_plain(p.x) || is_aliased(p); }

int64_t staged_pitch(const Problem& p, int64_t channels) { return is_aliased(p) ? channels + kPanel : channels; }

bool is_square(const Problem& p) {
  return p.kh == p.kw && p.stride[0] == p.stride[1] && p.stride[0] <= 2 && p.dil[0] == 1 && p.dil[1] == 1;
}

int shape_of(const Problem& p) {
  const DepthwiseKernels& k = depthwise_kernels(isa());
  const int shape = !is_square(p) ? -1 : p.kh == 3 ? 0 : p.kh == 5 ? 1 : -1;
  return shape >= 0 && k.tile[shape][0][0][0] != nullptr ? shape : -1;
}

// Entries of the table of inputs. A kernel far larger than the map (padding makes that legal) has more taps than memory
// could point to.
int64_t table_size(const Problem& p) {
  int64_t size = 0;
  if (__builtin_mul_overflow(p.kh * p.kw, kDepthwiseMaxCols, &size) || size > (int64_t{1} << 58))
    throw std::bad_alloc();
  constexpr int64_t kShaped = (2 + 5) * (6 * 2 + 5);  // 5x5 of stride 2, two rows of seven
  return std::max(size, kShaped);
}

}  // namespace

DepthwiseEpilogue depthwise_epilogue(Act act) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  return {act, act == Act::Relu || act == Act::Relu6 ? 0.0f : -kInf, act == Act::Relu6 ? 6.0f : kInf};
}

const DepthwiseKernels& depthwise_kernels(Isa isa) {
  static const DepthwiseKernels* const tables[kIsas] = {&scalar::depthwise_table, &avx2::depthwise_table,
                                                        &avx512::depthwise_table};
  return *tables[static_cast<int>(isa)];
}

size_t DepthwiseRows::scratch_bytes(const Problem& p, int64_t rows, int64_t channels) {
  const int64_t chunk = std::min(channels, kChunk);
  size_t bytes = 2 * Arena::bytes(channels, sizeof(float));  // zeros, ones
  bytes += Arena::bytes(table_size(p), sizeof(float*));      // inputs of a tile
  bytes += 2 * Arena::bytes(kMaxTile * chunk,
                            sizeof(float));  // outputs and residuals that are not plain
  if (is_staged(p)) bytes += Arena::bytes(input_rows(p, rows) * p.x.w * staged_pitch(p, channels), sizeof(float));
  return bytes;
}

bool DepthwiseRows::sweeps(const Problem& p) {
  return is_square(p) && p.kh == 3 && p.pad[1] <= 3 - p.stride[1] && depthwise_kernels(isa()).sweep[0][0] != nullptr;
}

DepthwiseRows::DepthwiseRows(const Problem& p, int64_t rows, int64_t channels, Arena& arena)
    : p_(p), k_(depthwise_kernels(isa())), sweeps_(sweeps(p)), shape_(shape_of(p)) {
  const int64_t chunk = std::min(channels, kChunk);
  zeros_ = arena.take<float>(channels);
  ones_ = arena.take<float>(channels);
  in_ = arena.take<const float*>(table_size(p));
  line_ = arena.take<float>(kMaxTile * chunk);
  added_ = arena.take<float>(kMaxTile * chunk);
  staged_ = !is_staged(p) ? nullptr : arena.take<float>(input_rows(p, rows) * p.x.w * staged_pitch(p, channels));
  std::fill(zeros_, zeros_ + channels, 0.0f);
  std::fill(ones_, ones_ + channels, 1.0f);
}

void DepthwiseRows::operator()(const DepthwiseBand& band, const DepthwiseTarget& target) {
  const Activation& x = p_.x;
  Source source{nullptr, 0, x.sh, x.sw};
  if (staged_ != nullptr)
    stage(band, source);
  else
    source.data = static_cast<const float*>(x.data) + x_row(p_, band.sample) * x.sn + band.channel;
  const auto run = sweeps_ ? &DepthwiseRows::strips : &DepthwiseRows::lines;
  if (is_straight(p_, target.to)) return (this->*run)(band, target, source);
  for (int64_t c = 0; c < band.channels; c += kChunk) {
    DepthwiseBand part = band;
    part.channel += c;
    part.channels = std::min(kChunk, band.channels - c);
    (this->*run)(part, target, {source.data + c, source.top, source.row_pitch, source.pixel_pitch});
  }
}

// Copies the band's input to [row][w][channels] fp32. Channel-last sources are read along channels, all others along
// the row, so that one side of the copy is always contiguous.
void DepthwiseRows::stage(const DepthwiseBand& band, Source& source) {
  const Activation& x = p_.x;
  const int64_t top = std::clamp<int64_t>(band.row * p_.stride[0] - p_.pad[0], 0, x.h);
  const int64_t end = std::min(x.h, top + input_rows(p_, band.rows)), c_end = band.channels;
  const int64_t pitch = staged_pitch(p_, c_end);
  const int64_t n = x_row(p_, band.sample);
  source = {staged_, top, x.w * pitch, pitch};
  for (int64_t iy = top; iy < end; ++iy) {
    float* to = staged_ + (iy - top) * source.row_pitch;
    const int64_t from = n * x.sn + iy * x.sh + band.channel * x.sc;
    if (is_plain(x)) {
      k_.copy(to, pitch, static_cast<const float*>(x.data) + from, x.sw, x.w, c_end);
    } else if (x.sc == 1) {
      for (int64_t ix = 0; ix < x.w; ++ix)
        for (int64_t c = 0; c < c_end; ++c) to[ix * pitch + c] = load_float(x.data, x.dtype, from + ix * x.sw + c);
    } else {
      for (int64_t c = 0; c < c_end; ++c)
        for (int64_t ix = 0; ix < x.w; ++ix)
          to[ix * pitch + c] = load_float(x.data, x.dtype, from + c * x.sc + ix * x.sw);
    }
  }
}

// Cuts the band into tiles: two rows (one with kernels of no special shape), and columns as wide as fit. Tiles side by
// side that touch no padding go in one call.
void DepthwiseRows::lines(const DepthwiseBand& band, const DepthwiseTarget& target, const Source& source) {
  const int64_t step = shape_ < 0 ? 1 : kDepthwiseRows, last = band.row + band.rows, sw = p_.stride[1];
  const int64_t reach_h = (p_.kh - 1) * p_.dil[0] + 1, reach_w = (p_.kw - 1) * p_.dil[1] + 1;
  const bool straight = is_straight(p_, target.to);
  for (int64_t row = band.row; row < last; row += step) {
    const int64_t rows = std::min(step, last - row), iy = row * p_.stride[0] - p_.pad[0];
    const bool inside_rows = iy >= 0 && iy + (rows - 1) * p_.stride[0] + reach_h <= p_.x.h;
    int64_t column = 0;
    for (int64_t width = 0; width < kDepthwiseWidths; ++width) {
      const int64_t columns = kDepthwiseCols[width];
      while (column + columns <= p_.y.w) {
        int64_t count = 1;
        const int64_t ix = column * sw - p_.pad[1];
        if (straight && inside_rows && ix >= 0)  // how many tiles end inside the image
          count = std::clamp<int64_t>((p_.x.w - reach_w - ix + sw) / (columns * sw), 1, (p_.y.w - column) / columns);
        tiles(band, target, source, row, rows, column, width, count);
        column += count * columns;
      }
    }
  }
}

void DepthwiseRows::list_inputs(const Source& source, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t iy0 = row * p_.stride[0] - p_.pad[0], ix0 = column * p_.stride[1] - p_.pad[1];
  const float** entry = in_;
  const auto pointer = [&](const float* line, int64_t ix) {
    return line != nullptr && ix >= 0 && ix < p_.x.w ? line + ix * source.pixel_pitch : zeros_;
  };
  const auto line_at = [&](int64_t iy) {
    return iy >= 0 && iy < p_.x.h ? source.data + (iy - source.top) * source.row_pitch : nullptr;
  };
  if (shape_ >= 0) {
    const int64_t in_rows = (rows - 1) * p_.stride[0] + p_.kh, in_columns = (columns - 1) * p_.stride[1] + p_.kw;
    for (int64_t r = 0; r < in_rows; ++r) {
      const float* line = line_at(iy0 + r);
      for (int64_t j = 0; j < in_columns; ++j) *entry++ = pointer(line, ix0 + j);
    }
    return;
  }
  for (int64_t ky = 0; ky < p_.kh; ++ky) {
    const float* line = line_at(iy0 + ky * p_.dil[0]);
    for (int64_t kx = 0; kx < p_.kw; ++kx)
      for (int64_t j = 0; j < columns; ++j) *entry++ = pointer(line, ix0 + kx * p_.dil[1] + j * p_.stride[1]);
  }
}

// Brings a tile of a residual that is not plain to scratch.
void DepthwiseRows::load_residual(const DepthwiseBand& band, int64_t row, int64_t rows, int64_t column,
                                  int64_t columns) {
  const Activation& residual = *p_.epilogue.residual;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t from = at(residual, band, residual_row(p_, band.sample), row + i / columns, column + i % columns);
    for (int64_t c = 0; c < band.channels; ++c)
      added_[i * band.channels + c] = load_float(residual.data, residual.dtype, from + c * residual.sc);
  }
}

// Writes a tile of outputs from scratch to a target that is not plain.
void DepthwiseRows::store(const DepthwiseBand& band, const DepthwiseTarget& target, int64_t row, int64_t rows,
                          int64_t column, int64_t columns) {
  const Activation& y = target.to;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t to = at(y, band, target.sample, row - target.first_row + i / columns, column + i % columns);
    for (int64_t c = 0; c < band.channels; ++c)
      store_float(y.data, y.dtype, to + c * y.sc, line_[i * band.channels + c]);
  }
}

// `count` tiles of rows x kDepthwiseCols[width] outputs from (row, column) on.
void DepthwiseRows::tiles(const DepthwiseBand& band, const DepthwiseTarget& target, const Source& source, int64_t row,
                          int64_t rows, int64_t column, int64_t width, int64_t count) {
  const Epilogue& e = p_.epilogue;
  const Activation &y = target.to, *residual = e.residual;
  const int64_t columns = kDepthwiseCols[width], outputs = rows * columns;
  list_inputs(source, row, rows, column, columns);
  const float* add[kMaxTile];
  float* out[kMaxTile];
  const bool plain_y = is_plain(y), plain_residual = residual != nullptr && is_plain(*residual);
  for (int64_t i = 0; i < outputs; ++i)
    out[i] = plain_y ? static_cast<float*>(y.data) +
                           at(y, band, target.sample, row - target.first_row + i / columns, column + i % columns)
                     : line_ + i * band.channels;
  if (residual != nullptr && !plain_residual) load_residual(band, row, rows, column, columns);
  for (int64_t i = 0; residual != nullptr && i < outputs; ++i)
    add[i] = plain_residual
                 ? static_cast<const float*>(residual->data) +
                       at(*residual, band, residual_row(p_, band.sample), row + i / columns, column + i % columns)
                 : added_ + i * band.channels;
  const int64_t table = table_at(p_, band);
  DepthwiseTiles t;
  t.in = in_, t.out = out, t.residual = residual != nullptr ? add : nullptr;
  t.tiles = count;
  t.in_step = columns * p_.stride[1] * source.pixel_pitch;
  t.out_step = columns * y.sw;
  t.residual_step = residual != nullptr ? columns * residual->sw : 0;
  t.channels = band.channels;
  t.weight = p_.depthwise + band.channel;
  t.taps = p_.kh * p_.kw, t.tap_stride = p_.depthwise_stride;
  t.scale = e.scale != nullptr ? e.scale + table : ones_;
  t.shift = e.shift != nullptr ? e.shift + table : zeros_;
  t.epilogue = depthwise_epilogue(e.act);
  (shape_ < 0 ? k_.any[width] : k_.tile[shape_][p_.stride[0] - 1][rows - 1][width])(t);
  if (!plain_y) store(band, target, row, rows, column, columns);
}

namespace {

// The cut into (sample, channel block, band of rows): bands innermost, so that a thread's neighbouring bands share
// rows.
struct Cut {
  bool planes, stream;
  int64_t rows, bands, channels, blocks;
};

// Whether to write past the caches: into whole lines, and where input and output together are so large that little of
// them would be found there again.
bool is_streamed(const Problem& p) {
  constexpr int64_t kLine = 64 / 4;
  const Activation& y = p.y;
  const double floats = static_cast<double>(p.count) * p.c_out * (1.0 * p.x.h * p.x.w + 1.0 * y.h * y.w);
  return DepthwiseRows::sweeps(p) && is_straight(p, y) && !is_curve(p.epilogue.act) && floats * 4 > kCacheBytes &&
         reinterpret_cast<uintptr_t>(y.data) % 64 == 0 && y.sw % kLine == 0 && y.sh % kLine == 0 && y.sn % kLine == 0;
}

Cut cut_of(const Problem& p, int64_t threads) {
  Cut cut{};
  cut.planes = DepthwisePlanes::fits(p);
  cut.rows = p.y.h;
  if (cut.planes) {
    cut.rows = DepthwisePlanes::band_rows(p);
  } else if (is_staged(p)) {
    const int64_t row_bytes = std::max<int64_t>(p.x.w * std::min(p.c_out, kChunk) * 4, 1);
    while (cut.rows > kDepthwiseRows && input_rows(p, cut.rows) * row_bytes > kStageBytes)
      cut.rows = ceil_div(ceil_div(cut.rows, 2), kDepthwiseRows) * kDepthwiseRows;
  } else if (threads > 1) {
    cut.rows = std::min(p.y.h, DepthwiseRows::sweeps(p) ? kSweepRows[p.stride[0] - 1] : kDepthwiseRows);
  }
  cut.bands = ceil_div(p.y.h, cut.rows);
  // Blocks of whole cache lines; converted input is bounded by kChunk channels.
  const int64_t wanted = threads == 1 ? 1 : ceil_div(kItemsPerThread * threads, p.count * cut.bands);
  cut.channels = ceil_div(ceil_div(p.c_out, std::clamp<int64_t>(wanted, 1, p.c_out)), kPanel) * kPanel;
  if (!cut.planes && is_staged(p)) cut.channels = std::min(cut.channels, kChunk);
  cut.channels = std::min(cut.channels, p.c_out);
  cut.blocks = ceil_div(p.c_out, cut.channels);
  cut.stream = !cut.planes && is_streamed(p);
  return cut;
}

template <class Body>
void run_items(const Problem& p, const Cut& cut, int64_t begin, int64_t end, Body& work) {
  for (int64_t i = begin; i < end; ++i) {
    DepthwiseBand band;
    band.row = i % cut.bands * cut.rows;
    band.rows = std::min(cut.rows, p.y.h - band.row);
    band.channel = i / cut.bands % cut.blocks * cut.channels;
    band.channels = std::min(cut.channels, p.c_out - band.channel);
    band.sample = i / cut.bands / cut.blocks;
    work(band, {p.y, y_row(p, band.sample), 0, cut.stream});
  }
}

void run_bands(const Problem& p, const Cut& cut, int64_t begin, int64_t end) {
  Arena& arena = thread_arena();
  if (cut.planes) {
    arena.reset(DepthwisePlanes::scratch_bytes(p));
    DepthwisePlanes work(p, arena);
    run_items(p, cut, begin, end, work);
  } else {
    arena.reset(DepthwiseRows::scratch_bytes(p, cut.rows, cut.channels));
    DepthwiseRows work(p, cut.rows, cut.channels, arena);
    run_items(p, cut, begin, end, work);
    if (cut.stream) depthwise_kernels(isa()).fence();
  }
}

}  // namespace

void run_depthwise(const Problem& p, int64_t threads) {
  const Cut cut = cut_of(p, threads);
  const int64_t items = p.count * cut.blocks * cut.bands;
  if (threads == 1) return run_bands(p, cut, 0, items);
  parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { run_bands(p, cut, begin, end); });
}

Step depthwise_step(const Problem& p, int64_t threads) {
  const Cut cut = cut_of(p, threads);
  return {p.count * cut.blocks * cut.bands, [&p, cut](int64_t begin, int64_t end) { run_bands(p, cut, begin, end); }};
}

}  // namespace effkern::conv
