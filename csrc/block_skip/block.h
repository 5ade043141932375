// A residual block as the engine runs it: two or three convolutions, the last with residual and activation.
#pragma once

#include <memory>
#include <vector>

#include "../common/packed_weight.h"
#include "keep.h"
#include "rows.h"

namespace effkern::block_skip {

enum class Kind { Basic, Bottleneck };

inline size_t convs_of(Kind kind) { return kind == Kind::Basic ? 2 : 3; }

class Block {
 public:
  // Checks and packs. `weights` are 4-d tensors of x's dtype or handles; the output channels are the length of the last
  // bias. `first` is the number of the first weight in messages: w1, w2, ...
  Block(const char* op, Kind kind, const View* weights, const View* biases, int64_t c_in, ScalarType dtype,
        int64_t stride, conv::Act act, conv::Algo algo, int64_t first = 1);

  int64_t c_out() const { return convs_.back().c_out; }
  int64_t stride() const { return stride_; }

  // Floats of scratch for one sample of an h x w input.
  int64_t scratch_floats(int64_t h, int64_t w) const;

  // Floats of weights that one run reads, Winograd's transforms where a kernel has them.
  int64_t weight_floats() const;

  // y[y_rows] = act(f(x[x_rows]) + residual[residual_rows]) for `count` listed samples. `scratch` holds
  // count * scratch_floats(). y may be x and the residual: every convolution but the last writes to scratch. `threads`
  // as for conv::run.
  void run(const conv::Activation& x, const int64_t* x_rows, const conv::Activation& residual,
           const int64_t* residual_rows, const conv::Activation& y, const int64_t* y_rows, int64_t count,
           float* scratch, int64_t threads) const;

 private:
  struct Conv {
    PackedWeight weight;
    FloatVector bias;
    int64_t c_in, c_out, stride, pad;
  };
  std::vector<Conv> convs_;
  int64_t stride_;
  conv::Act act_;
  conv::Algo algo_;
};

// Memory aligned to cache lines, not zeroed.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

// How many samples one thread should run at a time, so that what they read and write stays in its L2 cache.
int64_t samples_at_a_time(int64_t floats_per_sample);

// The samples of one decision: kept rows straight into y, soft rows through scratch, dropped rows untouched. On one
// thread (also inside a parallel loop) or on all of them.
void run_block(const Block& block, const Decision& decision, const conv::Activation& x,
               const conv::Activation& residual, const conv::Activation& y, int64_t threads);

}  // namespace effkern::block_skip
