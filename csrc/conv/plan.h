// How a problem is done: the cut into work items, chosen from shapes, types and the number of threads only. The cut
// decides who computes what, never a value.
#pragma once

#include "problem.h"

namespace effkern::conv {

constexpr int64_t kNearBytes = 512 * 1024;  // what a core's L2 holds at least

// F(tile x tile, 3 x 3) of a stride, on input tiles of `side`.
struct WinogradForm {
  Algo algo;
  int64_t stride, tile, side;
  int64_t last[4];  // side of the input tile, in values, that does the last 1, 2 or 3 outputs of a line
  // About the cycles of a core that does 16 multiply-adds a cycle for transforming 16 channels of a tile, and 16
  // weights.
  int64_t input_output, weight;
};

// An item is either several whole output maps (samples >= 1, all rows) or a band of rows of one map. Items are crossed
// with `panel_splits` ranges of output panels where there are fewer items than threads.
struct Plan {
  const WinogradForm* form;  // null: indirect GEMM
  bool staged;               // x is first copied, band by band, to fp32 channels-last scratch
  int64_t stage_pitch;       // floats from one staged pixel to the next
  int64_t stage_left;        // columns of zeros before a staged line's first pixel
  int64_t stage_width;       // columns of a staged line
  int64_t samples;           // maps per item
  int64_t rows;              // output rows per item
  int64_t bands;             // bands per map
  int64_t items;             // (samples, band) items
  int64_t panels;            // output panels of all groups
  int64_t panel_splits;      // ranges of panels
  int64_t in_rows;           // input rows that an item's rows need at most
  int64_t pixels;            // output pixels per item at most
  bool far;                  // the outputs are more than L2 holds: their lines are fetched ahead of the stores
  // Indirect GEMM: a pixel's sum runs over `taps` rows of `depth` floats, in parts of part_taps x part_depth.
  bool joined;  // a row holds all taps of a kernel's row, side by side in the staged line
  int64_t taps, depth, part_taps, part_depth;
};

// Values of a line of outputs: what is multiplied for it, per pair of channels.
inline int64_t line_values(const WinogradForm& form, int64_t outputs) {
  return outputs / form.tile * form.side + form.last[outputs % form.tile];
}

// The form the problem is done in, null for indirect GEMM. Looks at one sample only, so that a sample's bits do not
// depend on the batch.
const WinogradForm* winograd_form(const Problem& problem);

// True if the work is done sooner than a second thread is woken up: it then stays on the calling thread.
bool is_small(const Problem& problem);

// True if the work is done sooner than a thread that waits for it hears of it.
bool is_tiny(const Problem& problem);

Plan make_plan(const Problem& problem, int64_t threads);

// Floats of the staged copy of an item's input.
int64_t stage_floats(const Problem& problem, const Plan& plan);

// Floats of the zeros that taps in the padding point to.
int64_t zero_floats(const Problem& problem, const Plan& plan);

// Scratch of one thread, in bytes, for a plan of indirect GEMM.
int64_t scratch_bytes(const Problem& problem, const Plan& plan, int64_t tile_rows);

}  // namespace effkern::conv
