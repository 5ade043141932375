// One tile of indirect GEMM with its store, written once over the number of lanes. Included by ukernel_<isa>.cpp inside
// that set's namespace, behind lanes_impl.h and activation_impl.h; includes nothing itself.

// act(c * scale + shift + residual), the same expression as in store_rows. None, relu and relu6 are one clamp:
// comparisons with infinities are false, and with NaN too.
template <class Vec>
inline Vec clamped(Vec value, Vec low, Vec high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// kLanes outputs of row r from output v of the tile on.
template <int kLanes>
inline typename Lanes<kLanes>::Vec finished(const GemmTile& t, int64_t r, int64_t v, const float* residual) {
  using S = Lanes<kLanes>;
  typename S::Vec value = S::load(t.sums + r * kMaxCols + v) * S::load(t.scale + v) + S::load(t.shift + v);
  if (residual != nullptr) value += S::load(residual);
  if (t.curved) return curve<kLanes>(value, t.act);
  const typename S::Vec zero{};
  return clamped(value, zero + t.low, zero + t.high);
}

// The store of sums that cannot go straight from registers to memory: part of a vector, or an activation that is a
// curve. Rolled, so that it is compiled once.
template <int kLanes>
void store_sums(const GemmTile& t) {
  constexpr int kHalf = kLanes > 8 ? 8 : kLanes;
  for (int64_t r = 0; r < t.rows; ++r) {
    float* y = static_cast<float*>(t.y[r]) + t.y_offset;
    const float* residual =
        t.residual != nullptr ? static_cast<const float*>(t.residual[r]) + t.residual_offset : nullptr;
    const auto added = [&](int64_t v) { return residual != nullptr ? residual + v : nullptr; };
    int64_t v = 0;
    for (; v + kLanes <= t.cols; v += kLanes) Lanes<kLanes>::save(y + v, finished<kLanes>(t, r, v, added(v)));
    for (; v + kHalf <= t.cols; v += kHalf) Lanes<kHalf>::save(y + v, finished<kHalf>(t, r, v, added(v)));
    if (v == t.cols) continue;
    float line[kHalf], add[kHalf] = {};
    for (int64_t i = 0; residual != nullptr && v + i < t.cols; ++i) add[i] = residual[v + i];
    Lanes<kHalf>::save(line, finished<kHalf>(t, r, v, residual != nullptr ? add : nullptr));
    for (int64_t i = 0; v + i < t.cols; ++i) y[v + i] = line[i];
  }
}

// Fetches what the store of a tile will read and write: a few lines at each of many pixels, a pattern that no
// prefetcher of the processor follows. The tile's products take longer than a miss of L2. Inlined, or GCC finds that it
// changes nothing and drops the call.
template <int kRows>
__attribute__((always_inline)) inline void fetch_rows(const void* const* rows, int64_t channel, int64_t cols) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) __builtin_prefetch(static_cast<const float*>(rows[r]) + channel, 1);
  if (cols <= 16) return;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) __builtin_prefetch(static_cast<const float*>(rows[r]) + channel + 16, 1);
}

// kVecs vectors of kLanes outputs of each of kRows pixels, from output kFirst of the tile on.
template <int kLanes, int kVecs, int kRows, int kFirst>
struct Sums {
  using S = Lanes<kLanes>;
  using Vec = typename S::Vec;
  Vec acc[kRows][kVecs];

  static int64_t weight(int v, int64_t panel_stride) {
    const int at = kFirst + v * kLanes;
    return at / 16 * panel_stride + at % 16;
  }
  void begin(const GemmTile& t) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = t.more ? S::load(t.sums + r * kMaxCols + kFirst + v * kLanes) : Vec{};
  }
  void keep(const GemmTile& t) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) S::save(t.sums + r * kMaxCols + kFirst + v * kLanes, acc[r][v]);
  }
  void store(const GemmTile& t) {
    const Vec low = Vec{} + t.low, high = Vec{} + t.high;
    Vec scale[kVecs], shift[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      scale[v] = S::load(t.scale + kFirst + v * kLanes);
      shift[v] = S::load(t.shift + kFirst + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = acc[r][v] * scale[v] + shift[v];
    if (t.residual != nullptr) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
          acc[r][v] += S::load(static_cast<const float*>(t.residual[r]) + t.residual_offset + kFirst + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        S::save(static_cast<float*>(t.y[r]) + t.y_offset + kFirst + v * kLanes, clamped(acc[r][v], low, high));
  }
};

// kVecs vectors of kLanes and, if kTail, one of 8: together the outputs of the tile. AVX2: 6 rows x 2 vectors, or 6 x 1
// where a panel has no more than 8 outputs. AVX-512: 8 rows of 8, 16, 24 or 32, the last two from two panels, which
// halves what is loaded, pointed to and called for a product.
template <int kLanes, int kVecs, bool kTail, int kPitch, int kRows>
void gemm_rows(const GemmTile& t) {
  Sums<kLanes, kVecs, kRows, 0> sums;
  Sums<8, kTail ? 1 : 0, kRows, kVecs * kLanes> tail;
  if (t.last && t.fetch) {
    fetch_rows<kRows>(t.y, t.y_offset, t.cols);
    if (t.residual != nullptr) fetch_rows<kRows>(t.residual, t.residual_offset, t.cols);
  }
  sums.begin(t);
  tail.begin(t);
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const float* row[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) row[r] = t.a[tap * kPitch + r] + t.a_offset;
    const float *b = t.b + tap * t.tap_stride, *ahead = t.ahead + tap * t.tap_stride;
    for (int64_t i = 0; i < t.k; ++i, b += 16, ahead += 16) {
      __builtin_prefetch(ahead, 0, 2);
      typename Lanes<kLanes>::Vec w[kVecs + 1];
      typename Lanes<8>::Vec tail_w{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) w[v] = Lanes<kLanes>::load(b + sums.weight(v, t.panel_stride));
      if constexpr (kTail) tail_w = Lanes<8>::load(b + tail.weight(0, t.panel_stride));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const float x = row[r][i];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sums.acc[r][v] += x * w[v];
        if constexpr (kTail) tail.acc[r][0] += x * tail_w;
      }
    }
  }
  if (t.last && !t.curved && t.cols == kVecs * kLanes + (kTail ? 8 : 0)) {
    sums.store(t);
    tail.store(t);
  } else {
    sums.keep(t);
    tail.keep(t);
    if (t.last) store_sums<kLanes>(t);
  }
}

// Picks the instance for t.rows rows, 1 <= t.rows <= kRows.
template <int kLanes, int kVecs, bool kTail, int kPitch, int kRows>
void gemm_n(const GemmTile& t) {
  if constexpr (kRows > 1) {
    if (t.rows < kRows) return gemm_n<kLanes, kVecs, kTail, kPitch, kRows - 1>(t);
  }
  gemm_rows<kLanes, kVecs, kTail, kPitch, kRows>(t);
}

// One panel at a time.
template <int kLanes, int kPitch>
void gemm(const GemmTile& t) {
  if (t.cols <= 8)
    gemm_n<kLanes, 8 / kLanes, false, kPitch, kPitch>(t);
  else
    gemm_n<kLanes, 16 / kLanes, false, kPitch, kPitch>(t);
}

// Two panels where there are two.
template <int kPitch>
void gemm_pair(const GemmTile& t) {
  if (t.cols <= 8)
    gemm_n<8, 1, false, kPitch, kPitch>(t);
  else if (t.cols <= 16)
    gemm_n<16, 1, false, kPitch, kPitch>(t);
  else if (t.cols <= 24)
    gemm_n<16, 1, true, kPitch, kPitch>(t);
  else
    gemm_n<16, 2, false, kPitch, kPitch>(t);
}
