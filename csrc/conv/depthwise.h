// The depthwise convolution: one filter a channel, so a sum has as many terms as the kernel has taps and the work is to
// move the maps through the registers once.
#pragma once

#include <algorithm>

#include "../common/arena.h"
#include "depthwise_kernel.h"
#include "item.h"
#include "problem.h"

namespace effkern::conv {

// Runs a problem with `depthwise` set; called by run(). Every output is one sum over the taps in ascending order, taps
// in the padding included (as 0 * weight), whatever the layout, the tile or the thread: all layouts give the same bits.
void run_depthwise(const Problem& problem, int64_t threads);
Step depthwise_step(const Problem& problem, int64_t threads);

// Part of the outputs of one listed sample.
struct DepthwiseBand {
  int64_t sample, row, rows, channel, channels;
};

// Where a band goes: `to.data` is the output of row `first_row` of sample 0 of `to`, the band is written to `sample`.
struct DepthwiseTarget {
  const Activation& to;
  int64_t sample, first_row;
  bool stream = false;  // past the caches where the kernels can
};

// Computes bands on one thread, with the channels of a pixel in lanes. x may have any strides and type: unless it is
// channels-last fp32 a band's input is converted first.
class DepthwiseRows {
 public:
  // Whether the kernels for sets with many registers do it: 3x3 kernels of stride 1 or 2.
  static bool sweeps(const Problem& p);
  // Bands of at most `rows` rows and `channels` channels; takes its scratch from the arena.
  static size_t scratch_bytes(const Problem& p, int64_t rows, int64_t channels);
  DepthwiseRows(const Problem& p, int64_t rows, int64_t channels, Arena& arena);
  void operator()(const DepthwiseBand& band, const DepthwiseTarget& target);

 private:
  struct Source {
    const float* data;  // input row `top`, column 0, channel `channel` of the band
    int64_t top, row_pitch, pixel_pitch;
  };
  void stage(const DepthwiseBand& band, Source& source);
  void lines(const DepthwiseBand& band, const DepthwiseTarget& target, const Source& source);
  void strips(const DepthwiseBand& band, const DepthwiseTarget& target, const Source& source);
  void sweep(const DepthwiseBand& band, const DepthwiseTarget& target, const Source& source, int64_t row, int64_t rows,
             int64_t column, int64_t columns);
  const char* ahead(const DepthwiseBand& band, int64_t next, int64_t floats) const;
  void tiles(const DepthwiseBand& band, const DepthwiseTarget& target, const Source& source, int64_t row, int64_t rows,
             int64_t column, int64_t width, int64_t count);
  void load_residual(const DepthwiseBand& band, int64_t row, int64_t rows, int64_t column, int64_t columns);
  void store(const DepthwiseBand& band, const DepthwiseTarget& target, int64_t row, int64_t rows, int64_t column,
             int64_t columns);
  void list_inputs(const Source& source, int64_t row, int64_t rows, int64_t column, int64_t width);

  const Problem& p_;
  const DepthwiseKernels& k_;
  bool sweeps_;
  int shape_;  // 0: 3x3, 1: 5x5, of stride 1 or 2 without dilation; -1: any other
  float *zeros_, *ones_, *staged_, *line_, *added_;
  const float** in_;
};

// Computes bands on one thread, with the pixels of a channel in lanes: for maps that lie plane by plane.
class DepthwisePlanes {
 public:
  // False if x is channels-last, or if the kernel reaches so far that a band's input would not stay small.
  static bool fits(const Problem& p);
  static int64_t band_rows(const Problem& p);  // rows that keep a band in the L1 cache
  static size_t scratch_bytes(const Problem& p);
  DepthwisePlanes(const Problem& p, Arena& arena);
  void operator()(const DepthwiseBand& band, const DepthwiseTarget& target);

 private:
  void load(const DepthwiseBand& band, int64_t channel);
  void load_phase(const DepthwiseBand& band, int64_t channel, int64_t row_phase, int64_t column_phase, float* to);

  const Problem& p_;
  const DepthwiseKernels& k_;
  int64_t rows_, pitch_, in_rows_;                // of a band; input rows of a phase
  int64_t row_phases_, column_phases_;            // of the stride that some tap falls on
  int64_t *offset_, *row_phase_, *column_phase_;  // of the taps; of the phases
  float *x_, *out_, *added_;
};

inline bool is_plain(const Activation& t) { return t.dtype == DType::F32 && t.sc == 1; }

inline bool is_straight(const Problem& p, const Activation& y) {
  return is_plain(y) && (p.epilogue.residual == nullptr || is_plain(*p.epilogue.residual));
}

// The element of the band's first channel at a pixel.
inline int64_t at(const Activation& t, const DepthwiseBand& band, int64_t sample, int64_t row, int64_t column) {
  return sample * t.sn + row * t.sh + column * t.sw + band.channel * t.sc;
}

// Where the band's factors and addends begin.
inline int64_t table_at(const Problem& p, const DepthwiseBand& band) {
  const Epilogue& e = p.epilogue;
  return (e.table_row != nullptr ? e.table_row[x_row(p, band.sample)] * e.table_stride : 0) + band.channel;
}

}  // namespace effkern::conv
