// The inner loops of the weight gradient, written once over the number of lanes; included like conv/ukernel_impl.h by
// one file an instruction set. (No include guard: each file includes it once, in its own namespace.)

// kRows x 16 accumulators, of 6 x 2 vectors on AVX2 and 12 x 1 on AVX-512, as in the forward tile: a pixel costs kRows
// broadcasts and one line of gy.
template <int kLanes, int kRows>
void tile_rows(const Line* lines, int64_t count, int64_t x_offset, int64_t x_step, int64_t gy_offset, int64_t gy_step,
               bool add, float* c, const char* ahead, int64_t ahead_step) {
  using S = Lanes<kLanes>;
  constexpr int kVecs = 16 / kLanes;
  typename S::Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = typename S::Vec{};
  for (int64_t l = 0; l < count; ++l) {
    const float* x = lines[l].x + x_offset;
    const float* gy = lines[l].gy + gy_offset;
    for (int64_t q = lines[l].pixels; q > 0; --q, x += x_step, gy += gy_step, ahead += ahead_step) {
      __builtin_prefetch(ahead, 0, 2);
      typename S::Vec g[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) g[v] = S::load(gy + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] += x[r] * g[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* at = c + r * 16 + v * kLanes;
      S::save(at, add ? S::load(at) + acc[r][v] : acc[r][v]);
    }
}

// Picks the instance for n rows, 1 <= n <= kRows.
template <int kLanes, int kRows>
void tile(int64_t n, const Line* lines, int64_t count, int64_t x_offset, int64_t x_step, int64_t gy_offset,
          int64_t gy_step, bool add, float* c, const char* ahead, int64_t ahead_step) {
  if constexpr (kRows > 1) {
    if (n < kRows)
      return tile<kLanes, kRows - 1>(n, lines, count, x_offset, x_step, gy_offset, gy_step, add, c, ahead, ahead_step);
  }
  tile_rows<kLanes, kRows>(lines, count, x_offset, x_step, gy_offset, gy_step, add, c, ahead, ahead_step);
}

// kVecs vectors of channels x kTaps taps: gy is loaded once for all taps of a kernel row.
template <int kLanes, int kVecs, int kTaps>
void depthwise_block(const Line* lines, int64_t count, int64_t x_offset, int64_t gy_offset, int64_t x_step,
                     int64_t tap_step, int64_t gy_step, float* c) {
  using S = Lanes<kLanes>;
  typename S::Vec acc[kTaps][kVecs];
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[t][v] = typename S::Vec{};
  for (int64_t l = 0; l < count; ++l) {
    const float* x = lines[l].x + x_offset;
    const float* gy = lines[l].gy + gy_offset;
    for (int64_t q = lines[l].pixels; q > 0; --q, x += x_step, gy += gy_step) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const typename S::Vec g = S::load(gy + v * kLanes);
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) acc[t][v] += S::load(x + t * tap_step + v * kLanes) * g;
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* at = c + t * kMaxDepthwise + v * kLanes;
      S::save(at, S::load(at) + acc[t][v]);
    }
}

template <int kLanes, int kTaps>
void depthwise_taps(const Line* lines, int64_t count, int64_t x_offset, int64_t gy_offset, int64_t channels,
                    int64_t x_step, int64_t tap_step, int64_t gy_step, float* c) {
  constexpr int kVecs = 4;  // 3 taps x 4 vectors: enough sums in flight to hide the latency of the additions
  int64_t at = 0;
  for (; at + kVecs * kLanes <= channels; at += kVecs * kLanes)
    depthwise_block<kLanes, kVecs, kTaps>(lines, count, x_offset + at, gy_offset + at, x_step, tap_step, gy_step,
                                          c + at);
  for (; at + kLanes <= channels; at += kLanes)
    depthwise_block<kLanes, 1, kTaps>(lines, count, x_offset + at, gy_offset + at, x_step, tap_step, gy_step, c + at);
  for (; at < channels; ++at)
    depthwise_block<1, 1, kTaps>(lines, count, x_offset + at, gy_offset + at, x_step, tap_step, gy_step, c + at);
}

template <int kLanes>
void depthwise(int64_t taps, const Line* lines, int64_t count, int64_t x_offset, int64_t gy_offset, int64_t channels,
               int64_t x_step, int64_t tap_step, int64_t gy_step, float* c) {
  switch (taps) {
    case 3:
      return depthwise_taps<kLanes, 3>(lines, count, x_offset, gy_offset, channels, x_step, tap_step, gy_step, c);
    case 2:
      return depthwise_taps<kLanes, 2>(lines, count, x_offset, gy_offset, channels, x_step, tap_step, gy_step, c);
    default:
      return depthwise_taps<kLanes, 1>(lines, count, x_offset, gy_offset, channels, x_step, tap_step, gy_step, c);
  }
}

template <int kLanes>
void column_sum_block(const Line* lines, int64_t count, int64_t offset, int64_t gy_step, float* c) {
  using S = Lanes<kLanes>;
  typename S::Vec acc{};
  for (int64_t l = 0; l < count; ++l) {
    const float* gy = lines[l].gy + offset;
    for (int64_t q = lines[l].pixels; q > 0; --q, gy += gy_step) acc += S::load(gy);
  }
  S::save(c, S::load(c) + acc);
}

template <int kLanes>
void column_sum(const Line* lines, int64_t count, int64_t offset, int64_t channels, int64_t gy_step, float* c) {
  int64_t at = 0;
  for (; at + kLanes <= channels; at += kLanes) column_sum_block<kLanes>(lines, count, offset + at, gy_step, c + at);
  for (; at < channels; ++at) column_sum_block<1>(lines, count, offset + at, gy_step, c + at);
}
