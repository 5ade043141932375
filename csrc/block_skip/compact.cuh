// Row numbers of the kept samples of every block, ascending, without a trip to the host. One thread block a column of
// the mask: 256 rows at a time, a ballot in each warp, a sum over the 8 warps, so the order is that of the rows and the
// result the same in every run. Traffic: the mask once, the list once.
#pragma once

#include <cstdint>

namespace effkern::block_skip {

constexpr int kCompactThreads = 256, kWarp = 32, kCompactWarps = kCompactThreads / kWarp;

// Bits: the entries as unsigned integers of their size. `magnitude` masks the sign away, so that -0.0 is dropped.
template <class Bits>
__global__ void compact(const Bits* keep, Bits magnitude, int64_t n, int64_t row_stride, int64_t column_stride,
                        int32_t* idx, int32_t* count) {
  __shared__ int32_t kept_in_warp[kCompactWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t column = blockIdx.x;
  int32_t* rows = idx + column * n;
  int32_t total = 0;
  for (int64_t start = 0; start < n; start += kCompactThreads) {
    const int64_t row = start + thread;
    const bool kept = row < n && (keep[row * row_stride + column * column_stride] & magnitude) != 0;
    const unsigned votes = __ballot_sync(0xffffffffu, kept);
    if (lane == 0) kept_in_warp[warp] = __popc(votes);
    __syncthreads();
    int32_t before = total;
    for (int w = 0; w < kCompactWarps; ++w) {
      if (w < warp) before += kept_in_warp[w];
      total += kept_in_warp[w];
    }
    if (kept) rows[before + __popc(votes & ((1u << lane) - 1u))] = static_cast<int32_t>(row);
    __syncthreads();  // the counts are written again in the next round
  }
  for (int64_t i = total + thread; i < n; i += kCompactThreads) rows[i] = -1;
  if (thread == 0) count[column] = total;
}

}  // namespace effkern::block_skip
