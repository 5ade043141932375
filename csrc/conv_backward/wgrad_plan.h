// How a weight gradient is done. What decides about bits (blocks, chunks) follows from the shape; staging and splits
// do not change a bit and follow from strides and the number of threads.
#pragma once

#include "wgrad.h"

namespace effkern::conv {

// How a dense kernel reads x.
enum class Source {
  InPlace,
  Tiles,   // copied to [tile of input channels][pixel][tile's channels]
  Merged,  // copied with its padding to [pixel][channel]: the taps of a kernel row are then one dimension with the
           // channels
};

struct WgradPlan {
  bool depthwise;                // one filter a channel: elementwise instead of outer products
  Source source;                 // of a dense problem
  bool stage_x;                  // x is copied, block by block, to fp32 scratch
  bool stage_gy;                 // the same, some units at a time
  int64_t samples, rows, bands;  // a block: `samples` whole output maps, or `rows` rows of one, `bands` a map
  int64_t blocks, chunks, chunk_blocks;
  bool direct;                  // one block is all there is: sums are written out at once and take no memory
  int64_t in_rows, in_columns;  // of the input under a block at most; columns with padding if merged
  int64_t taps;
  int64_t tile_rows;    // of the kernel's full tile
  int64_t block_tiles;  // tiles of staged input channels at a time
  int64_t gy_panels;    // panels of staged gy at a time
  int64_t units;        // panels of 16 outputs of all groups, or blocks of 64 depthwise channels
  int64_t unit_floats;  // of the sums of a unit: [tap][in][16] or [tap][64], then its bias
  int64_t splits;       // ranges of units that different threads take
  int64_t max_runs, max_lines;
  int64_t x_floats, gy_floats;  // of the copies
};

WgradPlan make_wgrad_plan(const WgradProblem& problem, int64_t threads, int64_t tile_rows);

}  // namespace effkern::conv
