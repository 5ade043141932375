// The inner loops, one table per instruction set. All of them work on a tile of fp32 in cache.
#pragma once

#include <cstdint>

#include "../common/cpu.h"
#include "problem.h"

namespace effkern::multi_branch_bn {

constexpr int64_t kBlock = 256;  // most channels of an interleaved tile
constexpr int64_t kAhead = 512;  // floats from what is read to what is prefetched: what comes while memory answers

// Some pixels of some channels. Interleaved: element (p, c) of x[i] is x[i][p * x_pitch[i] + c]. Planar: one channel of
// one or more planes, pixel p of plane r is x[i][r * x_pitch[i] + p].
struct Tile {
  int64_t planes, pixels, channels;  // planes is 1 where interleaved
  const float* x[kMaxBranches];
  // Elements to what is prefetched. Interleaved: some pixels on. Planar: to the next run of pixels.
  int64_t x_pitch[kMaxBranches], x_ahead[kMaxBranches];
  const float* grad;
  int64_t grad_pitch, grad_ahead;
  float* out[kMaxBranches];  // y, or the dx that are wanted
  int64_t out_pitch;
  bool past;  // out is written past the caches: its rows start at whole cache lines, and are whole ones
  // z = shift + sum of scale[i] * (x[i] - mean[i]), a vector over the channels each. Subtracting first keeps z exact
  // where |mean| is much larger than the deviation; what the rounding of mean to fp32 lost is in shift.
  const float *mean[kMaxBranches], *scale[kMaxBranches], *shift;
  float floor;  // y = z cut off below: 0 for ReLU; NaN, which nothing is below, for none
  // dx[i] = scale[i] * g + slope[i] * (x[i] - mean[i]) + offset[i], g the gradient at z.
  const float *slope[kMaxBranches], *offset[kMaxBranches];
  float* sums;  // [1 + branches][channels]: of g, and of g * (x[i] - mean[i]); for moments see there
};

using TileLoop = void (*)(const Tile&);

// Indexed by the number of branches minus 1.
struct Loops {
  TileLoop moments[kMaxBranches];     // sums[2 * i][c] = sum of x[i] - mean[i], sums[2 * i + 1][c] = sum of its square
  TileLoop apply[kMaxBranches];       // writes y
  TileLoop grad_sums[kMaxBranches];   // writes sums
  TileLoop grad_batch[kMaxBranches];  // writes dx
  TileLoop grad_fixed[kMaxBranches];  // writes dx = scale * g: statistics that do not depend on x
};

struct Kernels {
  Loops planar, interleaved;
  // Adds moments of n values about `center`, [2][channels], to those about `pivot`; then moves center to their mean.
  void (*move_moments)(const float* part, int64_t channels, double n, const float* pivot, float* center, double* first,
                       double* second);
  void (*widen)(const void* from, DType dtype, int64_t count, float* to);
  void (*narrow)(const float* from, DType dtype, int64_t count, void* to);
  // A copy past the caches, for outputs too large to be found there by whoever reads them.
  void (*stream)(const float* from, int64_t count, float* to);
  void (*streamed)();  // after all that went past the caches, before another thread may read it
};

const Kernels& kernels(Isa isa);

namespace scalar {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
extern const Kernels table16;  // the 16-lane code of avx512 on 8-lane registers, for tests on narrower machines
}  // namespace avx2
namespace avx512 {
extern const Kernels table;
}

}  // namespace effkern::multi_branch_bn
