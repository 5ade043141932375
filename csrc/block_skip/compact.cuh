// Row numbers of the kept samples of every block, ascending, without a trip to the host. One thread block a column of
// the mask: 256 rows at a time, a ballot in each warp, a sum over the 8 warps, so the order is that of the rows and the
// result the same in every run. Traffic: the mask once, the list once.
#pragma once

#include <cstdint>

#include "compact.h"

namespace effkern::block_skip {

constexpr int kCompactThreads = 256, kWarp = 32, kCompactWarps = kCompactThreads / kWarp;
constexpr int kCompactShared = kCompactWarps * 4;  // bytes

// Bits: the entries as unsigned integers of their size. `magnitude` masks the sign away, so that -0.0 is dropped.
template <class Bits>
__global__ void __launch_bounds__(kCompactThreads)
    compact(device::Global<const Bits> keep, Bits magnitude, int64_t n, int64_t row_stride, int64_t column_stride,
            device::Global<int32_t> idx, device::Global<int32_t> count, bool rest) {
  const device::Shared<int32_t> kept_in_warp = device::shared_memory().as<int32_t>();
  const int thread = device::thread(), lane = device::lane(), warp = thread / kWarp;
  const int64_t column = device::block();
  const device::Global<int32_t> rows = idx + column * n;
  int32_t total = 0;
  for (int64_t start = 0; start < n; start += kCompactThreads) {
    const int64_t row = start + thread;
    const bool kept =
        row < n && (device::load<Bits>(keep + (row * row_stride + column * column_stride)) & magnitude) != 0;
    const uint32_t votes = device::ballot(kept);
    if (lane == 0) device::store(kept_in_warp + warp, static_cast<int32_t>(device::popcount(votes)));
    device::sync();
    int32_t before = total;
    for (int w = 0; w < kCompactWarps; ++w) {
      const int32_t kept_there = device::load<int32_t>(kept_in_warp + w);
      if (w < warp) before += kept_there;
      total += kept_there;
    }
    before += device::popcount(votes & ((1u << lane) - 1u));
    if (kept)
      device::store(rows + before, static_cast<int32_t>(row));
    else if (rest && row < n)  // row - before were dropped before this one
      device::store(rows + (n - 1 - (row - before)), static_cast<int32_t>(row));
    device::sync();  // the counts are written again in the next round
  }
  if (!rest)
    for (int64_t i = total + thread; i < n; i += kCompactThreads) device::store(rows + i, int32_t{-1});
  if (thread == 0) device::store(count + column, total);
}

}  // namespace effkern::block_skip
