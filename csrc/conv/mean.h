// Averages over the windows of a map, as a network's shortcuts and its last layer take them.
#pragma once

#include "problem.h"

namespace effkern::conv {

struct Mean {
  Activation x, y;  // channels of y that x lacks become zero
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1};
};

// The size of y: `up` keeps a last window that reaches past the map, of which only what lies on it is averaged.
int64_t mean_size(int64_t in, int64_t kernel, int64_t stride, bool up);

// An output is the sum of its window's sums by row over their number, whatever the batch or the threads.
Step mean_step(const Mean& mean);

}  // namespace effkern::conv
