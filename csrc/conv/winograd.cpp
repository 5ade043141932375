#include "winograd.h"

#include <cstring>

#include "../common/arena.h"
#include "item.h"

namespace effkern::conv {
namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kLine = 16;  // floats of padding that keep parallel streams out of one cache set

// Input channels whose weights are transformed at a time: two rows of transforms (24 KiB) are written to and read from
// L1. The sums go on in memory, in the same order.
constexpr int64_t kChunk = 32, kUPlane = kChunk * kPanel + 2 * kLine;
// Of weights that were transformed beforehand 16 KiB, half of L1, are used by all tiles before the next.
constexpr int64_t kPackedChunk = 256;

// All rows of a block of channels come before the next block: its weights are then read from L2, a pack once from
// memory.
constexpr int64_t kBlock = 256;
constexpr int64_t kBatch = 8;  // lines of weights fetched at a time

int64_t block_of(int64_t depth, int64_t chunk) {
  const int64_t blocks = (depth + kBlock - 1) / kBlock, chunks = (depth + chunk - 1) / chunk;
  return std::max<int64_t>((chunks + blocks - 1) / blocks, 1) * chunk;
}

// Weights are read and transforms written side by side. Loads that share the low 12 bits of an address with a recent
// store wait for it, so the transforms begin this far, modulo 4 KiB, behind the weights: 110 instead of 160 to 220
// cycles per input channel of a panel on Zen 4.
constexpr int64_t kPage = 4096, kBehind = 1536;

float* behind(float* scratch, const float* weights) {
  const int64_t gap = reinterpret_cast<int64_t>(weights) + kBehind - reinterpret_cast<int64_t>(scratch);
  return scratch + (gap & (kPage - 1)) / static_cast<int64_t>(Arena::kAlign) *
                       static_cast<int64_t>(Arena::kAlign / sizeof(float));
}

// Sizes of the scratch buffers, in floats.
struct Sizes {
  int64_t side;              // of an input tile; side * side values are multiplied a tile and channel
  int64_t tiles;             // of an item at most
  int64_t v_pitch, v_plane;  // input transforms [value][tile][channel]
  int64_t m_plane;           // products [value][tile][16]
  int64_t v_total, u_total, m_total;

  Sizes(const Problem& p, const Plan& plan, const WinogradKernels& f) {
    side = f.side;
    tiles = plan.samples * ((plan.rows + f.out - 1) / f.out) * ((p.y.w + f.out - 1) / f.out);
    v_pitch = p.c_in % 512 == 0 ? p.c_in + kLine : p.c_in;
    v_plane = (tiles * v_pitch + 15) / 16 * 16 + kLine;
    m_plane = tiles * kPanel + kLine;
    v_total = side * side * v_plane;
    u_total = 2 * f.weight_side * kUPlane + kPage / static_cast<int64_t>(sizeof(float));
    m_total = side * side * m_plane;
  }
};

class Worker {
 public:
  Worker(const Problem& p, const Plan& plan, const Kernels& kernels)
      : p_(p), plan_(plan), k_(kernels), wino_(kernels.winograd(plan.form->tile)), size_(p, plan, wino_) {
    Arena& arena = thread_arena();
    arena.reset(static_cast<size_t>(winograd_scratch_bytes(p, plan, kernels)));
    v_ = arena.take<float>(size_.v_total);
    u_ = arena.take<float>(size_.u_total);
    m_ = arena.take<float>(size_.m_total);
    rows_ = arena.take<const float*>(size_.tiles + kMaxRows);
    panel_ = arena.take<float>(p.weight->scratch_floats());
    staged_ = arena.take<float>(stage_floats(p, plan));
    const int64_t values = size_.side * size_.side;
    batches_ = (kTaps * kChunk / kBatch + values - 1) / values;
    pixels_ = (plan.pixels + values - 1) / values;
    in_pack_ = p.weight->tap_stride / kPanel;
    fetch_weights_ = p.weight->scratch_floats() == 0 &&
                     kTaps * p.c_in / p.groups * p.c_out * static_cast<int64_t>(sizeof(float)) > kNearBytes;
    for (int64_t t = 0; t < size_.tiles; ++t) rows_[t] = v_ + t * size_.v_pitch;
  }

  void take(const Item& item) {
    item_ = item;
    if (plan_.staged) stage(p_, plan_, item_, staged_);
    number_tiles();
    transform_input();
  }

  void run_panels(int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) run_panel(panel_at(p_, i));
  }

 private:
  void run_panel(const PanelPlace& panel) {
    const int64_t in_group = p_.c_in / p_.groups, tap_stride = p_.weight->tap_stride;
    const float* packed = wino_.side == 6 ? p_.weight->transformed(panel.group, panel.index) : nullptr;
    const float* g = packed != nullptr ? nullptr : p_.weight->panel(panel.group, panel.index, panel_);
    const int64_t chunk = packed != nullptr ? kPackedChunk : kChunk;
    const int64_t plane = packed != nullptr ? tap_stride : kUPlane;
    const int64_t block = block_of(in_group, chunk);
    const bool far = fetch_weights_ && packed == nullptr;
    Pixels pixels;
    for (int64_t first = 0; first < in_group; first += block)
      for (int64_t pair = 0; pair < wino_.pairs; ++pair)
        for (int64_t k = first; k < std::min(first + block, in_group); k += chunk) {
          const int64_t depth = std::min(chunk, in_group - k);
          const float* u = packed != nullptr ? packed + pair * 2 * wino_.weight_side * plane + k * kPanel
                                             : transform_weight(pair, g + k * kPanel, depth);
          Lines lines;
          if (far) {
            const bool here = first + block < in_group;  // the next block is this panel's, or the next panel's first
            lines = {g + (here ? k + block : kTaps * in_pack_ + k - first) * kPanel, kTaps * pair / wino_.pairs,
                     kTaps * (pair + 1) / wino_.pairs};
          }
          for (int64_t i = 0; i < size_.side; ++i) {
            const int64_t row = wino_.weight_of[i], r = row == wino_.weight_row[pair][0] ? 0 : 1;
            if (row != wino_.weight_row[pair][r]) continue;
            for (int64_t j = 0; j < size_.side; ++j) {
              const int64_t value = i * size_.side + j, offset = value * size_.v_plane + panel.group * in_group + k;
              const int64_t column = wino_.weight_of[j], tap = wino_.tap_of(row, column);
              const float* b =
                  tap >= 0 ? g + tap * tap_stride + k * kPanel : u + (r * wino_.weight_side + column) * plane;
              const Range& tiles = range_[wino_.piece[down_].has[i]][wino_.piece[across_].has[j]];
              if (far) fetch(lines);
              if (plan_.far && k + chunk >= in_group) fetch(pixels, panel.channel);
              multiply(tiles, offset, depth, b, k > 0, m_ + value * size_.m_plane);
            }
          }
        }
    finish(panel.channel, panel.cols);
  }

  const float* transform_weight(int64_t pair, const float* g, int64_t depth) {
    float* u = behind(u_, g);
    wino_.weight(pair, g, p_.weight->tap_stride, depth, u, kUPlane);
    return u;
  }

  // Fetched into L2 beside the products, which leave the memory idle: the next block of weights, and with the last
  // chunk what finish() reads and writes, a line at every pixel. Prefetchers of processors follow neither.
  struct Lines {
    const float* from = nullptr;         // of a chunk, tap 0
    int64_t tap = 0, end = 0, line = 0;  // the next line, and the last tap
  };
  struct Pixels {
    int64_t sample = 0, row = 0, column = 0;  // the next pixel
  };

  // The share of a value: each is called for side * side times.
  void fetch(Lines& f) const {
    for (int64_t n = batches_; n > 0 && f.tap < f.end; --n) {
      const float* line = f.from + f.tap * p_.weight->tap_stride + f.line * kPanel;
#pragma GCC unroll 8
      for (int64_t i = 0; i < kBatch; ++i) __builtin_prefetch(line + i * kPanel, 0, 2);
      if ((f.line += kBatch) < kChunk) continue;
      f.line = 0;
      ++f.tap;
    }
  }

  void fetch(Pixels& f, int64_t channel) const {
    const Activation* residual = p_.epilogue.residual;
    for (int64_t left = pixels_; left > 0 && f.sample < item_.samples;) {
      const int64_t i = item_.first + f.sample, oy = item_.row + f.row, count = std::min(left, p_.y.w - f.column);
      fetch_pixels(p_.y, y_row(p_, i), oy, f.column, channel, count);
      if (residual != nullptr) fetch_pixels(*residual, residual_row(p_, i), oy, f.column, channel, count);
      left -= count;
      if ((f.column += count) < p_.y.w) continue;
      f.column = 0;
      if (++f.row < item_.rows) continue;
      f.row = 0;
      ++f.sample;
    }
  }

  // Inlined, or GCC finds that it changes nothing and drops the calls.
  __attribute__((always_inline)) static void fetch_pixels(const Activation& t, int64_t n, int64_t y, int64_t x,
                                                          int64_t channel, int64_t count) {
    if (t.sc != 1) return;
    const char* pixel = at(t, n * t.sn + y * t.sh + x * t.sw + channel);
    const int64_t step = t.sw * dtype_size(t.dtype);
    for (; count > 0; --count, pixel += step) __builtin_prefetch(pixel, 1, 2);
  }

  // Tiles are numbered in four zones, so that those which have a value are side by side: whole tiles down and the
  // shorter ones across, whole tiles, shorter down and whole across, shorter both ways.
  enum Zone { kRight, kWhole, kBottom, kCorner, kZones };

  // Tiles [begin, end) have a value; `step` of them are multiplied at a time.
  struct Range {
    int64_t begin, end, step;
  };

  void multiply(const Range& tiles, int64_t offset, int64_t depth, const float* b, bool more, float* m) {
    for (int64_t t = tiles.begin; t < tiles.end; t += tiles.step)
      k_.tile(std::min(tiles.step, tiles.end - t), rows_ + t, offset, 1, depth, b, 0, more, m + t * kPanel);
  }

  // Calls body(oy, ox, piece down, piece across, number) for every tile of the next sample of the item; `next` holds
  // the next number of each zone.
  template <class Body>
  void each_tile(int64_t (&next)[kZones], Body body) const {
    const int64_t m = wino_.out, end = item_.row + item_.rows;
    for (int64_t oy = item_.row; oy < end; oy += m) {
      const int down = end - oy < m ? down_ : 0;
      for (int64_t ox = 0; ox < p_.y.w; ox += m) {
        const int across = p_.y.w - ox < m ? across_ : 0;
        const Zone zone = down != 0 ? (across != 0 ? kCorner : kBottom) : (across != 0 ? kRight : kWhole);
        body(oy, ox, down, across, next[zone]++);
      }
    }
  }

  void number_tiles() {
    const int64_t m = wino_.out;
    down_ = wino_.piece_of(item_.rows % m);
    across_ = wino_.piece_of(p_.y.w % m);
    const int64_t below = down_ != 0, beside = across_ != 0;
    const int64_t lines = (item_.rows + m - 1) / m - below, columns = (p_.y.w + m - 1) / m - beside;
    const int64_t tiles[kZones] = {lines * beside, lines * columns, below * columns, below * beside};
    zone_[0] = 0;
    for (int z = 0; z < kZones; ++z) zone_[z + 1] = zone_[z] + item_.samples * tiles[z];
    for (const bool down : {false, true})
      for (const bool across : {false, true}) {
        Range& r = range_[down][across];
        r.begin = across ? 0 : zone_[kWhole];
        r.end = zone_[!down ? kBottom : !across ? kCorner : kZones];
        // Even shares: a few rows alone wait for the latency of their additions.
        const int64_t count = r.end - r.begin, shares = std::max<int64_t>((count + k_.rows - 1) / k_.rows, 1);
        r.step = (count + shares - 1) / shares;
      }
  }

  void transform_input() {
    // Inputs that no output needs (stride 2 may leave a row and a column) are zeros to every plan.
    const int64_t h = std::min(p_.x.h, (p_.y.h - 1) * p_.stride[0] + 3 - p_.pad[0]);
    const int64_t w = std::min(p_.x.w, (p_.y.w - 1) * p_.stride[1] + 3 - p_.pad[1]);
    int64_t next[kZones] = {zone_[0], zone_[1], zone_[2], zone_[3]};
    for (int64_t s = 0; s < item_.samples; ++s) {
      const Image image = image_of(p_, plan_, item_, s, staged_);
      each_tile(next, [&](int64_t oy, int64_t ox, int down, int across, int64_t number) {
        const int64_t iy = oy * p_.stride[0] - p_.pad[0], ix = ox * p_.stride[1] - p_.pad[1];
        const int64_t rows = wino_.piece[down].side, columns = wino_.piece[across].side;
        InputTile tile;
        tile.x = image.data + (iy - image.top) * image.row_pitch + ix * image.pixel_pitch;
        tile.row_pitch = image.row_pitch;
        tile.pixel_pitch = image.pixel_pitch;
        tile.y0 = std::clamp<int64_t>(-iy, 0, rows);
        tile.y1 = std::clamp<int64_t>(h - iy, tile.y0, rows);
        tile.x0 = std::clamp<int64_t>(-ix, 0, columns);
        tile.x1 = std::clamp<int64_t>(w - ix, tile.x0, columns);
        wino_.input[down][across](tile, p_.c_in, v_ + number * size_.v_pitch, size_.v_plane);
      });
    }
  }

  void finish(int64_t channel, int64_t cols) {
    const Epilogue& e = p_.epilogue;
    alignas(64) float c[kMaxStore * kPanel];
    Store s = store_of(p_, cols);
    int64_t next[kZones] = {zone_[0], zone_[1], zone_[2], zone_[3]};
    for (int64_t sample = 0; sample < item_.samples; ++sample) {
      const int64_t i = item_.first + sample;
      const int64_t table = e.table_row != nullptr ? e.table_row[x_row(p_, i)] * e.table_stride : 0;
      s.scale[0] = e.scale != nullptr ? e.scale + table + channel : nullptr;
      s.shift[0] = e.shift != nullptr ? e.shift + table + channel : nullptr;
      const int64_t y0 = y_row(p_, i) * p_.y.sn + channel * p_.y.sc;
      const int64_t r0 = s.has_residual ? residual_row(p_, i) * e.residual->sn + channel * e.residual->sc : 0;
      each_tile(next, [&](int64_t oy, int64_t ox, int down, int across, int64_t number) {
        wino_.output[down][across](m_ + number * kPanel, size_.m_plane, c);
        const int64_t out = wino_.piece[across].out;
        const int64_t h = std::min<int64_t>(wino_.piece[down].out, p_.y.h - oy), w = std::min(out, p_.y.w - ox);
        if (w < out)  // close the gaps of a cut tile
          for (int64_t dy = 1; dy < h; ++dy) std::memmove(c + dy * w * kPanel, c + dy * out * kPanel, w * kPanel * 4);
        s.rows = 0;
        for (int64_t dy = 0; dy < h; ++dy)
          for (int64_t dx = 0; dx < w; ++dx, ++s.rows) {
            s.y[s.rows] = const_cast<char*>(at(p_.y, y0 + (oy + dy) * p_.y.sh + (ox + dx) * p_.y.sw));
            if (s.has_residual)
              s.residual[s.rows] = at(*e.residual, r0 + (oy + dy) * e.residual->sh + (ox + dx) * e.residual->sw);
          }
        k_.store(s, c);
      });
    }
  }

  const Problem& p_;
  const Plan& plan_;
  const Kernels& k_;
  const WinogradKernels& wino_;
  const Sizes size_;
  Item item_{};
  int down_ = 0, across_ = 0;           // pieces at the end of the item's sides
  Range range_[2][2] = {};              // of the values that the shorter tiles down and across have or lack
  int64_t zone_[kZones + 1] = {};       // number of the first tile of each zone
  int64_t batches_, pixels_, in_pack_;  // fetched beside the products of a value
  bool fetch_weights_;                  // the weights are more than L2 holds
  float *v_, *u_, *m_, *panel_, *staged_;
  const float** rows_;
};

}  // namespace

int64_t winograd_scratch_bytes(const Problem& p, const Plan& plan, const Kernels& kernels) {
  const Sizes size(p, plan, kernels.winograd(plan.form->tile));
  const size_t bytes = Arena::bytes(size.v_total, sizeof(float)) + Arena::bytes(size.u_total, sizeof(float)) +
                       Arena::bytes(size.m_total, sizeof(float)) + Arena::bytes(size.tiles + kMaxRows, sizeof(float*)) +
                       Arena::bytes(p.weight->scratch_floats(), sizeof(float)) +
                       Arena::bytes(stage_floats(p, plan), sizeof(float));
  return static_cast<int64_t>(bytes);
}

void run_winograd(const Problem& p, const Plan& plan, const Kernels& kernels, int64_t begin, int64_t end) {
  Worker work(p, plan, kernels);
  walk(p, plan, begin, end, work);
}

}  // namespace effkern::conv
