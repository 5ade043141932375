// The keep mask as row lists: which samples run a block, which run it softly, which skip it.
#pragma once

#include <vector>

#include "../common/tensor.h"

namespace effkern::block_skip {

// Samples of a range by what they do at one block, each list ascending.
struct Decision {
  std::vector<int64_t> kept, soft, dropped;
  std::vector<float> gate;  // of the soft ones, in (0, 1)
};

class KeepMask {
 public:
  // [N] (one block) or [N, B]: bool, uint8, float32, bfloat16 or float16 with every entry in [0, 1]. `dim` is 1 or 2.
  KeepMask(const View& keep, int64_t dim, Arg arg);

  int64_t samples() const { return samples_; }
  int64_t blocks() const { return blocks_; }
  float at(int64_t sample, int64_t block) const { return value_[sample * blocks_ + block]; }

  // Share of the entries that are not 0: of all samples and blocks, what runs.
  double share() const;

  // What samples begin..end-1 do at `block`; rows are counted from `begin`.
  Decision decide(int64_t block, int64_t begin, int64_t end) const;

 private:
  int64_t samples_, blocks_;
  std::vector<float> value_;
};

}  // namespace effkern::block_skip
