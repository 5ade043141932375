// The inner loops of the weight gradient, one table per instruction set: sums over pixels of products of x and gy.
#pragma once

#include <cstdint>

#include "../common/cpu.h"

namespace effkern::conv {

constexpr int64_t kMaxTileRows = 12;   // input channels of a tile
constexpr int64_t kMaxDepthwise = 64;  // channels of a depthwise block

// Output pixels one after the other in a row, and for each the input pixel under the tap in question.
struct Line {
  const float* x;
  const float* gy;
  int64_t pixels;
};

struct WgradKernels {
  int64_t rows;  // input channels per full tile, at most kMaxTileRows
  // c[r][0..16) = or += (`add`) the sum over lines, then pixels q, of line.x[x_offset + q * x_step + r] *
  // line.gy[gy_offset + q * gy_step + (0..16)], r < n. One accumulator per element, so the order of the sum is the same
  // for every n. Every pixel fetches one cache line into L2, from `ahead` on, ahead_step bytes apart.
  void (*tile)(int64_t n, const Line* lines, int64_t count, int64_t x_offset, int64_t x_step, int64_t gy_offset,
               int64_t gy_step, bool add, float* c, const char* ahead, int64_t ahead_step);
  // c[t][i] += the sum over lines, then pixels q, of line.x[x_offset + q * x_step + t * tap_step + i] *
  // line.gy[gy_offset + q * gy_step + i], t < taps <= 3, i < channels <= kMaxDepthwise, which is c's pitch.
  void (*depthwise)(int64_t taps, const Line* lines, int64_t count, int64_t x_offset, int64_t gy_offset,
                    int64_t channels, int64_t x_step, int64_t tap_step, int64_t gy_step, float* c);
  // c[0..channels) += the sum over lines, then pixels, of gy.
  void (*column_sum)(const Line* lines, int64_t count, int64_t offset, int64_t channels, int64_t gy_step, float* c);
};

const WgradKernels& wgrad_kernels(Isa isa);

namespace scalar {
extern const WgradKernels wgrad_table;
}
namespace avx2 {
extern const WgradKernels wgrad_table;
extern const WgradKernels wgrad_table16;  // the 16-lane code of avx512 on 8-lane registers, for tests
}  // namespace avx2
namespace avx512 {
extern const WgradKernels wgrad_table;
}

}  // namespace effkern::conv
