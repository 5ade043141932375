// The steps of a sliced chain, read and checked.
#pragma once

#include <vector>

#include "../common/packed_weight.h"

namespace effkern::sliced_conv {

// A convolution, dense or depthwise; a squeeze and excitation of the value before, in its place; a mean over the map.
struct ChainStep {
  enum Kind : int64_t { kConv, kAttention, kMean };
  Kind kind;
  int64_t handle, table;              // table: number of a pair of tables, -1 for none
  int64_t expand;                     // of attention: the second handle
  int64_t outs, ins, kh, kw, groups;  // of the whole weight; of attention `outs` is the size between the two layers
  Geometry g;
  conv::Act act;
  std::vector<int64_t> widths;  // channels of the result in every configuration
  int64_t h, w;                 // of the result
  bool depthwise() const { return groups > 1; }
};

struct Chain {
  int64_t configurations;
  std::vector<ChainStep> steps;
};

// Reads what write_steps() of effkern/ops/sliced_conv/chain.py wrote; ValueError for anything that does not fit x, the
// handles and the number of tables.
Chain read_chain(const std::vector<int64_t>& numbers, const conv::Activation& x, const std::vector<Tensor>& handles,
                 int64_t tables, const char* op);

}  // namespace effkern::sliced_conv
