// The weight gradient as outer products over pixels: for a block of pixels and a panel of 16 outputs, tiles of input
// channels, then taps, each with the sums of a tile in registers over all pixels of the block.
#include "wgrad.h"

#include <algorithm>
#include <cstring>

#include "../common/arena.h"
#include "../common/parallel.h"
#include "stage.h"
#include "wgrad_plan.h"
#include "wgrad_ukernel.h"

namespace effkern::conv {
namespace {

// Lines of `taps` taps from `tap` on, which all share their output pixels.
struct Run {
  int64_t tap, taps, first, count;
};

struct Block {
  int64_t first, samples;  // listed samples
  int64_t row, rows;       // output rows
};

// Part of one dimension.
struct Span {
  int64_t begin, end;
};

// One panel's or depthwise unit's part of gw and gb.
class Writer {
 public:
  explicit Writer(const WgradProblem& p) : p_(p), in_(p.c_in / p.groups) {}

  // Input channels [begin, end) of a panel's sums [tap][in][16], 16 at a time so that they stay in L1.
  void panel(int64_t group, int64_t output, int64_t lanes, int64_t begin, int64_t end, const float* c) const {
    const int64_t at = group * p_.gw.group_stride + output * p_.gw.so;
    const int64_t taps = p_.kh * p_.kw;
    const bool dense = p_.gw.sw == 1 && p_.gw.sh == p_.kw && p_.gw.si == taps;
    if (p_.gw.dtype == DType::F32 && !p_.accumulate && dense) {
      float* out = static_cast<float*>(p_.gw.data) + at;
      return taps == 1 ? pointwise(lanes, begin, end, c, out) : filters(lanes, begin, end, taps, c, out);
    }
    for (int64_t i0 = begin; i0 < end; i0 += 16) {
      const int64_t i1 = std::min(i0 + 16, end);
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t i = i0; i < i1; ++i)
          channel(at + lane * p_.gw.so + i * p_.gw.si, c + i * kPanel + lane, kPanel * in_);
    }
  }

  // All taps of one pair of channels, whose sums lie `step` apart.
  void channel(int64_t at, const float* c, int64_t step) const {
    for (int64_t ky = 0; ky < p_.kh; ++ky)
      for (int64_t kx = 0; kx < p_.kw; ++kx, c += step) {
        const int64_t to = at + ky * p_.gw.sh + kx * p_.gw.sw;
        if (p_.gw.dtype != DType::F32) {
          store_float(p_.gw.data, p_.gw.dtype, to, *c);
        } else {
          float* out = static_cast<float*>(p_.gw.data) + to;
          *out = p_.accumulate ? *out + *c : *c;
        }
      }
  }

  void bias(int64_t channel, int64_t channels, const float* c) const {
    for (int64_t i = 0; i < channels; ++i) p_.gb[channel + i] = p_.accumulate ? p_.gb[channel + i] + c[i] : c[i];
  }

 private:
  // The same where gw is dense fp32. Element by element it would be a third of the time of a 1x1 layer on a small map.
  void pointwise(int64_t lanes, int64_t begin, int64_t end, const float* c, float* out) const {
    for (int64_t i = begin; i < end; i += 4) {
      int64_t lane = 0;
      if (i + 4 <= end)
        for (; lane + 4 <= lanes; lane += 4)
          transpose(c + i * kPanel + lane, kPanel, out + lane * p_.gw.so + i, p_.gw.so);
      for (; lane < lanes; ++lane)
        for (int64_t k = i; k < std::min(i + 4, end); ++k) out[lane * p_.gw.so + k] = c[k * kPanel + lane];
    }
  }

  void filters(int64_t lanes, int64_t begin, int64_t end, int64_t taps, const float* c, float* out) const {
    const int64_t step = kPanel * in_;
    for (int64_t i0 = begin; i0 < end; i0 += 16)
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float* to = out + lane * p_.gw.so + i0 * taps;
        for (int64_t i = i0; i < std::min(i0 + 16, end); ++i) {
          const float* from = c + i * kPanel + lane;
          for (int64_t tap = 0; tap < taps; ++tap) *to++ = from[tap * step];
        }
      }
  }

  const WgradProblem& p_;
  int64_t in_;
};

// Adds the chunks of a unit in ascending order and writes what is wanted.
void finish(const WgradProblem& p, const WgradPlan& plan, int64_t unit, float* sums) {
  float* c = sums + unit * plan.unit_floats;
  for (int64_t k = 1; k < plan.chunks; ++k) {
    const float* more = c + k * plan.units * plan.unit_floats;
    for (int64_t i = 0; i < plan.unit_floats; ++i) c[i] += more[i];
  }
  const Writer write(p);
  const int64_t in = p.c_in / p.groups, out = p.c_out / p.groups, panels = panels_of(out);
  if (plan.depthwise) {
    const int64_t channel = unit * kMaxDepthwise, channels = std::min(kMaxDepthwise, p.c_out - channel);
    for (int64_t i = 0; p.gw.data != nullptr && i < channels; ++i)
      write.channel((channel + i) * p.gw.group_stride, c + i, kMaxDepthwise);
    if (p.gb != nullptr) write.bias(channel, channels, c + plan.unit_floats - kMaxDepthwise);
    return;
  }
  const int64_t group = unit / panels, output = unit % panels * kPanel, lanes = std::min(kPanel, out - output);
  if (p.gw.data != nullptr) write.panel(group, output, lanes, 0, in, c);
  if (p.gb != nullptr) write.bias(group * out + output, lanes, c + plan.unit_floats - kPanel);
}

constexpr int64_t kAheadBytes = 320 * 1024;  // of one operand, in a 512 KiB L2

// Memory that the next block will read, handed out in pieces to the loops of the current one.
class Ahead {
 public:
  void clear() { count_ = next_ = 0; }
  void add(const void* data, int64_t bytes) {
    if (count_ < kMost) spans_[count_++] = {static_cast<const char*>(data), bytes};
  }
  // Where to fetch the next `lines` cache lines, or null.
  const char* take(int64_t lines) {
    if (next_ == count_) return nullptr;
    const char* from = spans_[next_].data;
    spans_[next_].data += lines * 64;
    spans_[next_].bytes -= lines * 64;
    if (spans_[next_].bytes <= 0) ++next_;
    return from;
  }

 private:
  static constexpr int64_t kMost = 64;
  struct Bytes {
    const char* data;
    int64_t bytes;
  };
  Bytes spans_[kMost];
  int64_t count_ = 0, next_ = 0;
};

class Worker {
 public:
  Worker(const WgradProblem& p, const WgradPlan& plan, const WgradKernels& kernels, float* sums)
      : p_(p), plan_(plan), k_(kernels), sums_(sums) {
    Arena& arena = thread_arena();
    arena.reset(Arena::bytes(plan.max_lines, sizeof(Line)) + Arena::bytes(plan.max_runs, sizeof(Run)) +
                Arena::bytes(plan.x_floats, sizeof(float)) + Arena::bytes(plan.gy_floats, sizeof(float)));
    lines_ = arena.take<Line>(plan.max_lines);
    runs_ = arena.take<Run>(plan.max_runs);
    staged_x_ = arena.take<float>(plan.x_floats);
    staged_gy_ = arena.take<float>(plan.gy_floats);
    in_ = p.c_in / p.groups, out_ = p.c_out / p.groups;
    merged_ = plan.source == Source::Merged;
    x_pixel_ = !plan.stage_x ? p.x.sw : plan.depthwise ? kMaxDepthwise : merged_ ? in_ : plan.tile_rows;
    x_row_ = plan.stage_x ? plan.in_columns * x_pixel_ : p.x.sh;
    gy_pixel_ = !plan.stage_gy ? p.gy.sw : plan.depthwise ? kMaxDepthwise : kPanel;
    gy_row_ = plan.stage_gy ? p.gy.w * gy_pixel_ : p.gy.sh;
  }

  void operator()(int64_t chunk, int64_t split) {
    const int64_t begin = plan_.units * split / plan_.splits, end = plan_.units * (split + 1) / plan_.splits;
    const int64_t last = std::min((chunk + 1) * plan_.chunk_blocks, plan_.blocks);
    float* sums = sums_ + chunk * plan_.units * plan_.unit_floats;
    for (int64_t b = chunk * plan_.chunk_blocks; b < last; ++b) {
      const bool add = b > chunk * plan_.chunk_blocks;
      take(b);
      if (plan_.depthwise)
        for (int64_t unit = begin; unit < end; ++unit) depthwise(unit, add, sums + unit * plan_.unit_floats);
      else
        dense(begin, end, add, sums);
    }
  }

 private:
  // Lists rows of a tensor that the next block will read, if they lie together and do not push out the current one.
  void look_ahead(const Activation& t, int64_t n, int64_t row, int64_t rows) {
    const int64_t bytes = rows * t.sh * dtype_size(t.dtype);
    if (t.sc == 1 && t.sh == t.w * t.sw && bytes * block_.samples <= kAheadBytes)
      ahead_.add(static_cast<const char*>(t.data) + (n * t.sn + row * t.sh) * dtype_size(t.dtype), bytes);
  }

  Block block_at(int64_t b) const {
    Block block;
    block.first = b / plan_.bands * plan_.samples;
    block.samples = std::min(plan_.samples, p_.count - block.first);
    block.row = b % plan_.bands * plan_.rows;
    block.rows = std::min(plan_.rows, p_.gy.h - block.row);
    return block;
  }

  // Makes b the current block and lists its lines.
  void take(int64_t b) {
    ahead_.clear();
    if (b + 1 < plan_.blocks) {
      block_ = block_at(b + 1);
      for (int64_t s = 0; s < block_.samples; ++s) {
        const int64_t top = std::clamp<int64_t>(block_.row * p_.stride[0] - p_.pad[0], 0, p_.x.h);
        look_ahead(p_.x, x_sample(s), top, std::min(plan_.in_rows, p_.x.h - top));
        look_ahead(p_.gy, gy_sample(s), block_.row, block_.rows);
      }
    }
    block_ = block_at(b);
    top_ = plan_.stage_x ? std::clamp<int64_t>(block_.row * p_.stride[0] - p_.pad[0], 0, p_.x.h) : 0;
    line_count_ = run_count_ = 0;
    for (int64_t ky = 0; ky < p_.kh; ++ky) {
      if (merged_) {
        begin_run(ky, 0, p_.kw);
        add_lines(ky, 0, {0, p_.gy.w});
        continue;
      }
      for (int64_t kx = 0; kx < p_.kw; kx += plan_.depthwise ? 3 : 1) {
        if (plan_.depthwise) {
          list_taps(ky, kx, std::min<int64_t>(3, p_.kw - kx));
        } else {
          begin_run(ky, kx, 1);
          add_lines(ky, kx, columns(kx));
        }
      }
    }
    all_ = {0, 1, line_count_, 0};
    for (int64_t s = 0; p_.gb != nullptr && s < block_.samples; ++s)
      for (int64_t row = 0; row < block_.rows; ++row, ++all_.count)
        lines_[line_count_++] = {nullptr, gy_at(s) + row * gy_row_, p_.gy.w};
  }

  // Runs of up to 3 depthwise taps: the columns where all of them lie inside, then what is left of each.
  void list_taps(int64_t ky, int64_t kx, int64_t taps) {
    const Span inner = {columns(kx).begin, columns(kx + taps - 1).end};
    const bool together = taps > 1 && inner.begin < inner.end;
    if (together) {
      begin_run(ky, kx, taps);
      add_lines(ky, kx, inner);
    }
    for (int64_t t = kx; t < kx + taps; ++t) {
      const Span own = columns(t);
      begin_run(ky, t, 1);
      if (together) {
        add_lines(ky, t, {own.begin, std::min(own.end, inner.begin)});
        add_lines(ky, t, {std::max(own.begin, inner.end), own.end});
      } else {
        add_lines(ky, t, own);
      }
      if (runs_[run_count_ - 1].count == 0) --run_count_;
    }
  }

  // Output columns whose input column under tap kx lies inside the image.
  Span columns(int64_t kx) const {
    const int64_t shift = kx * p_.dil[1] - p_.pad[1], step = p_.stride[1];
    const int64_t begin = shift >= 0 ? 0 : (-shift + step - 1) / step;
    const int64_t end = p_.x.w - 1 < shift ? 0 : (p_.x.w - 1 - shift) / step + 1;
    return {begin, std::min(end, p_.gy.w)};
  }

  void begin_run(int64_t ky, int64_t kx, int64_t taps) {
    runs_[run_count_++] = {ky * p_.kw + kx, taps, line_count_, 0};
  }

  // Adds the given columns of every row of the block to the last run; what continues the line before is joined to it.
  void add_lines(int64_t ky, int64_t kx, Span span) {
    if (span.begin >= span.end) return;
    Run& run = runs_[run_count_ - 1];
    const int64_t pixels = span.end - span.begin, x_step = p_.stride[1] * x_pixel_;
    const int64_t left = merged_ ? 0 : p_.pad[1];  // merged copies begin with the padding
    const int64_t x_column = (span.begin * p_.stride[1] - left + kx * p_.dil[1]) * x_pixel_;
    for (int64_t s = 0; s < block_.samples; ++s) {
      const float* x = plan_.stage_x ? staged_x_ + s * plan_.in_rows * x_row_
                                     : static_cast<const float*>(p_.x.data) + x_sample(s) * p_.x.sn;
      const float* gy = gy_at(s);
      for (int64_t row = 0; row < block_.rows; ++row) {
        const int64_t iy = (block_.row + row) * p_.stride[0] - p_.pad[0] + ky * p_.dil[0];
        if (iy < 0 || iy >= p_.x.h) continue;
        const Line line = {x + (iy - top_) * x_row_ + x_column, gy + row * gy_row_ + span.begin * gy_pixel_, pixels};
        Line* last = run.count > 0 ? lines_ + line_count_ - 1 : nullptr;
        if (last != nullptr && last->x + last->pixels * x_step == line.x &&
            last->gy + last->pixels * gy_pixel_ == line.gy) {
          last->pixels += pixels;
        } else {
          lines_[line_count_++] = line;
          ++run.count;
        }
      }
    }
  }

  int64_t x_sample(int64_t s) const { return p_.x_rows != nullptr ? p_.x_rows[block_.first + s] : block_.first + s; }
  int64_t gy_sample(int64_t s) const { return p_.gy_rows != nullptr ? p_.gy_rows[block_.first + s] : block_.first + s; }

  // gy of the block's sample s at the block's first row.
  const float* gy_at(int64_t s) const {
    if (plan_.stage_gy) return staged_gy_ + s * plan_.rows * gy_row_;
    return static_cast<const float*>(p_.gy.data) + gy_sample(s) * p_.gy.sn + block_.row * p_.gy.sh;
  }

  // Floats from one tile of staged input channels to the next.
  int64_t tile_floats() const { return plan_.samples * plan_.in_rows * x_row_; }

  // First channel of tile i of `tiles`: they are even.
  static int64_t tile_begin(int64_t i, int64_t tiles, int64_t channels) { return channels * i / tiles; }

  // Copies tiles [first, last) of a group's input channels, all of them side by side if merged.
  void stage_x(int64_t group, int64_t first, int64_t last, int64_t tiles) {
    const int64_t end = std::min(top_ + plan_.in_rows, p_.x.h), channel = group * in_;
    for (int64_t s = 0; s < block_.samples; ++s)
      for (int64_t y = top_; y < end; ++y) {
        float* row = staged_x_ + (s * plan_.in_rows + y - top_) * x_row_;
        if (merged_) {
          const int64_t columns = std::clamp<int64_t>(plan_.in_columns - p_.pad[1], 0, p_.x.w);
          const int64_t left = std::min(p_.pad[1], plan_.in_columns), right = left + columns;
          std::fill(row, row + left * in_, 0.0f);
          stage_row(p_.x, x_sample(s), y, columns, channel, in_, in_, in_, row + left * in_);
          std::fill(row + right * in_, row + plan_.in_columns * in_, 0.0f);
          continue;
        }
        for (int64_t i = first; i < last; ++i, row += tile_floats()) {
          const int64_t begin = tile_begin(i, tiles, in_), n = tile_begin(i + 1, tiles, in_) - begin;
          stage_row(p_.x, x_sample(s), y, p_.x.w, channel + begin, n, n, x_pixel_, row);
        }
      }
  }

  // Floats from one copied panel of gy to the next.
  int64_t panel_floats() const { return plan_.samples * plan_.rows * gy_row_; }

  // Copies the block's part of `channels` channels of gy, panel by panel; what is left of a pixel's width becomes 0.
  void stage_gy(int64_t channel, int64_t channels) {
    for (int64_t s = 0; s < block_.samples; ++s)
      for (int64_t row = 0; row < block_.rows; ++row)
        for (int64_t c = 0; c < channels; c += gy_pixel_)
          stage_row(p_.gy, gy_sample(s), block_.row + row, p_.gy.w, channel + c, std::min(channels - c, gy_pixel_),
                    gy_pixel_, gy_pixel_,
                    staged_gy_ + c / gy_pixel_ * panel_floats() + (s * plan_.rows + row) * gy_row_);
  }

  // Adds the block's part of the panels [begin, end), each [tap][in][16].
  void dense(int64_t begin, int64_t end, bool add, float* sums) {
    const int64_t block_pixels = block_.samples * block_.rows * p_.gy.w;
    const char* fallback = reinterpret_cast<const char*>(sums);
    const int64_t panels = panels_of(out_), rows = merged_ ? p_.kw * in_ : in_;
    const int64_t tiles = (rows + plan_.tile_rows - 1) / plan_.tile_rows;
    const int64_t block_tiles = merged_ || !plan_.stage_x ? std::max<int64_t>(tiles, 1) : plan_.block_tiles;
    for (int64_t group = begin / panels; group * panels < end; ++group) {
      const int64_t from = std::max(begin, group * panels), to = std::min(end, (group + 1) * panels);
      for (int64_t first = 0; first == 0 || first < tiles; first += block_tiles) {
        const int64_t last = p_.gw.data != nullptr ? std::min(first + block_tiles, tiles) : first;
        if (plan_.stage_x && last > first) stage_x(group, first, last, tiles);
        for (int64_t unit = from; unit < to; ++unit) {
          const int64_t output = (unit - group * panels) * kPanel, channel = group * out_ + output;
          const int64_t slot = (unit - from) % plan_.gy_panels;
          if (plan_.stage_gy && slot == 0 && (first == 0 || plan_.gy_panels < to - from))
            stage_gy(channel, std::min(std::min(plan_.gy_panels, to - unit) * kPanel, out_ - output));
          const int64_t gy_offset = plan_.stage_gy ? slot * panel_floats() : channel;
          float* c = sums + (plan_.direct ? from : unit) * plan_.unit_floats;
          for (int64_t i = first; i < last; ++i) {
            const int64_t row = tile_begin(i, tiles, rows), n = tile_begin(i + 1, tiles, rows) - row;
            const int64_t x_offset = !plan_.stage_x ? group * in_ + row : merged_ ? row : (i - first) * tile_floats();
            for (int64_t r = 0; r < run_count_; ++r) {
              const Run& run = runs_[r];
              const char* ahead = ahead_.take(block_pixels);
              k_.tile(n, lines_ + run.first, run.count, x_offset, p_.stride[1] * x_pixel_, gy_offset, gy_pixel_, add,
                      c + (run.tap * in_ + row) * kPanel, ahead != nullptr ? ahead : fallback,
                      ahead != nullptr ? 64 : 0);
            }
          }
          if (p_.gb != nullptr && first == 0) bias(gy_offset, kPanel, add, c + plan_.unit_floats - kPanel);
          if (!plan_.direct) continue;
          const Writer write(p_);
          const int64_t lanes = std::min(kPanel, out_ - output);
          if (last > first)
            write.panel(group, output, lanes, merged_ ? 0 : tile_begin(first, tiles, in_),
                        merged_ ? in_ : tile_begin(last, tiles, in_), c);
          if (p_.gb != nullptr && first == 0) write.bias(channel, lanes, c + plan_.unit_floats - kPanel);
        }
      }
    }
  }

  // Adds the block's part of 64 depthwise channels, [tap][64].
  void depthwise(int64_t unit, bool add, float* c) {
    const int64_t channel = unit * kMaxDepthwise, channels = std::min(kMaxDepthwise, p_.c_out - channel);
    if (plan_.stage_gy) stage_gy(channel, channels);
    const int64_t gy_offset = plan_.stage_gy ? 0 : channel;
    if (p_.gw.data != nullptr) {
      const int64_t end = std::min(top_ + plan_.in_rows, p_.x.h);
      for (int64_t s = 0; plan_.stage_x && s < block_.samples; ++s)
        for (int64_t y = top_; y < end; ++y)
          stage_row(p_.x, x_sample(s), y, p_.x.w, channel, channels, channels, x_pixel_,
                    staged_x_ + (s * plan_.in_rows + y - top_) * x_row_);
      if (!add) std::memset(c, 0, static_cast<size_t>(plan_.unit_floats - kMaxDepthwise) * sizeof(float));
      for (int64_t r = 0; r < run_count_; ++r) {
        const Run& run = runs_[r];
        k_.depthwise(run.taps, lines_ + run.first, run.count, plan_.stage_x ? 0 : channel, gy_offset, channels,
                     p_.stride[1] * x_pixel_, p_.dil[1] * x_pixel_, gy_pixel_, c + run.tap * kMaxDepthwise);
      }
    }
    if (p_.gb != nullptr) bias(gy_offset, channels, add, c + plan_.unit_floats - kMaxDepthwise);
  }

  void bias(int64_t gy_offset, int64_t channels, bool add, float* c) {
    if (!add) std::memset(c, 0, static_cast<size_t>(channels) * sizeof(float));
    k_.column_sum(lines_ + all_.first, all_.count, gy_offset, channels, gy_pixel_, c);
  }

  const WgradProblem& p_;
  const WgradPlan& plan_;
  const WgradKernels& k_;
  float *sums_, *staged_x_, *staged_gy_;
  Line* lines_;
  Run* runs_;
  Run all_{};  // every pixel of gy, for the bias
  Block block_{};
  Ahead ahead_;
  int64_t line_count_ = 0, run_count_ = 0, top_ = 0;
  bool merged_;
  int64_t in_, out_, x_row_, x_pixel_, gy_row_, gy_pixel_;
};

bool is_small(const WgradProblem& p) {
  // As in conv/plan.cpp: less than the wake-up of a second thread costs.
  const double macs = static_cast<double>(p.count) * p.gy.h * p.gy.w * p.c_out * p.kh * p.kw;
  return macs * (p.c_in / p.groups) < 1e6;
}

// The calling thread's, for the sums of all chunks; thread_arena() belongs to the workers.
Arena& sums_arena() {
  static thread_local Arena arena;
  return arena;
}

}  // namespace

void wgrad(const WgradProblem& problem) {
  if (problem.c_out == 0 || problem.groups == 0) return;
  WgradProblem p = problem;
  // A 1x1 kernel sees a grid of the input only: as if that were the input.
  if (p.kh == 1 && p.pad[0] == 0 && p.gy.h > 0) p.x.h = p.gy.h, p.x.sh *= p.stride[0], p.stride[0] = 1;
  if (p.kw == 1 && p.pad[1] == 0 && p.gy.w > 0) p.x.w = p.gy.w, p.x.sw *= p.stride[1], p.stride[1] = 1;
  const int64_t threads = is_small(p) ? 1 : num_threads();
  const WgradKernels& k = wgrad_kernels(isa());
  const WgradPlan plan = make_wgrad_plan(p, threads, k.rows);
  Arena& arena = sums_arena();
  const int64_t floats = plan.chunks * plan.units * plan.unit_floats;
  arena.reset(Arena::bytes(floats, sizeof(float)));
  float* sums = arena.take<float>(floats);
  const auto compute = [&](int64_t begin, int64_t end) {
    Worker work(p, plan, k, sums);
    for (int64_t i = begin; i < end; ++i) work(i / plan.splits, i % plan.splits);
  };
  const auto write = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) finish(p, plan, unit, sums);
  };
  if (threads == 1) {
    compute(0, plan.chunks * plan.splits);
    if (!plan.direct) write(0, plan.units);
  } else {
    parallel_for(0, plan.chunks * plan.splits, 1, compute);
    if (!plan.direct) parallel_for(0, plan.units, 1 + 65536 / (plan.chunks * plan.unit_floats), write);
  }
}

}  // namespace effkern::conv
