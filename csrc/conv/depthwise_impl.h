// The depthwise inner loops, written once over the number of lanes. Included by depthwise_<isa>.cpp inside that set's
// namespace and after its target pragma, behind activation_impl.h and a definition of MaskedMemory; includes nothing
// itself.

// Loads and stores of whole vectors, or of the first n lanes.
template <int kLanes, bool kMasked>
struct Memory {
  using Vec = typename Lanes<kLanes>::Vec;
  int n;
  Vec load(const float* p) const {
    if constexpr (kMasked)
      return MaskedMemory<kLanes>::load(p, n);
    else
      return Lanes<kLanes>::load(p);
  }
  void save(float* p, Vec v) const {
    if constexpr (kMasked)
      MaskedMemory<kLanes>::save(p, n, v);
    else
      Lanes<kLanes>::save(p, v);
  }
};

template <class Vec>
inline Vec clamp(Vec v, Vec low, Vec high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// acc[kCount] to memory: act(acc * scale + shift + residual).
template <int kLanes, bool kMasked, int kCount>
inline __attribute__((always_inline)) void finish(const DepthwiseTiles& t, int64_t tile, int64_t c, int n,
                                                  const typename Lanes<kLanes>::Vec* acc) {
  using Vec = typename Lanes<kLanes>::Vec;
  const Memory<kLanes, kMasked> memory{n};
  const Vec scale = memory.load(t.scale + c), shift = memory.load(t.shift + c);
  Vec v[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) v[i] = acc[i] * scale + shift;
  if (t.residual != nullptr) {
    const int64_t at = tile * t.residual_step + c;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) v[i] += memory.load(t.residual[i] + at);
  }
  const int64_t at = tile * t.out_step + c;
  if (is_curve(t.epilogue.act)) {
    Vec line[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) line[i] = v[i];
#pragma GCC unroll 1
    for (int i = 0; i < kCount; ++i) memory.save(t.out[i] + at, curve<kLanes>(line[i], t.epilogue.act));
    return;
  }
  const Vec low = Vec{} + t.epilogue.low, high = Vec{} + t.epilogue.high;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) memory.save(t.out[i] + at, clamp(v[i], low, high));
}

// One block of lanes of one tile. Every input is loaded once and meets all outputs it belongs to; per output the taps
// still come in ascending order.
template <int kLanes, int kKernel, int kStride, int kRows, int kCols>
inline __attribute__((always_inline)) void block(const DepthwiseTiles& t, int64_t tile, int64_t c) {
  using Vec = typename Lanes<kLanes>::Vec;
  constexpr int kInRows = (kRows - 1) * kStride + kKernel, kInCols = (kCols - 1) * kStride + kKernel;
  const Memory<kLanes, false> memory{kLanes};
  Vec acc[kRows * kCols];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kCols; ++i) acc[i] = Vec{};
  const int64_t at = tile * t.in_step + c;
#pragma GCC unroll 8
  for (int r = 0; r < kInRows; ++r) {
#pragma GCC unroll 32
    for (int j = 0; j < kInCols; ++j) {
      const Vec x = memory.load(t.in[r * kInCols + j] + at);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const int ky = r - row * kStride;
        if (ky < 0 || ky >= kKernel) continue;
#pragma GCC unroll 8
        for (int kx = 0; kx < kKernel; ++kx) {
          if (j < kx || (j - kx) % kStride != 0 || (j - kx) / kStride >= kCols) continue;
          acc[row * kCols + (j - kx) / kStride] += x * memory.load(t.weight + (ky * kKernel + kx) * t.tap_stride + c);
        }
      }
    }
  }
  finish<kLanes, false, kRows * kCols>(t, tile, c, kLanes, acc);
}

// The last channels of a tile, fewer than a vector: the same sums in less code.
template <int kLanes, int kKernel, int kStride, int kRows, int kCols>
inline __attribute__((always_inline)) void last_block(const DepthwiseTiles& t, int64_t tile, int64_t c, int n) {
  using Vec = typename Lanes<kLanes>::Vec;
  constexpr int kInCols = (kCols - 1) * kStride + kKernel;
  const Memory<kLanes, true> memory{n};
  Vec acc[kRows * kCols];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kCols; ++i) acc[i] = Vec{};
  const int64_t at = tile * t.in_step + c;
#pragma GCC unroll 1
  for (int tap = 0; tap < kKernel * kKernel; ++tap) {
    const Vec w = memory.load(t.weight + tap * t.tap_stride + c);
    const float* const* in = t.in + tap / kKernel * kInCols + tap % kKernel;
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kCols; ++i)
      acc[i] += memory.load(in[i / kCols * kStride * kInCols + i % kCols * kStride] + at) * w;
  }
  finish<kLanes, true, kRows * kCols>(t, tile, c, n, acc);
}

template <int kLanes, int kKernel, int kStride, int kRows, int kCols>
void shaped(const DepthwiseTiles& t) {
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    int64_t c = 0;
    for (; c + kLanes <= t.channels; c += kLanes) block<kLanes, kKernel, kStride, kRows, kCols>(t, tile, c);
    if (c < t.channels)
      last_block<kLanes, kKernel, kStride, kRows, kCols>(t, tile, c, static_cast<int>(t.channels - c));
  }
}

template <int kLanes, bool kMasked, int kCols>
inline __attribute__((always_inline)) void any_block(const DepthwiseTiles& t, int64_t tile, int64_t c, int n) {
  using Vec = typename Lanes<kLanes>::Vec;
  const Memory<kLanes, kMasked> memory{n};
  Vec acc[kCols];
#pragma GCC unroll 16
  for (int i = 0; i < kCols; ++i) acc[i] = Vec{};
  const int64_t at = tile * t.in_step + c;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const Vec w = memory.load(t.weight + tap * t.tap_stride + c);
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i) acc[i] += memory.load(t.in[tap * kCols + i] + at) * w;
  }
  finish<kLanes, kMasked, kCols>(t, tile, c, n, acc);
}

template <int kLanes, int kCols>
void any(const DepthwiseTiles& t) {
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    int64_t c = 0;
    for (; c + kLanes <= t.channels; c += kLanes) any_block<kLanes, false, kCols>(t, tile, c, kLanes);
    if (c < t.channels) any_block<kLanes, true, kCols>(t, tile, c, static_cast<int>(t.channels - c));
  }
}

template <int kLanes>
void curve_line(float* data, int64_t n, Act act) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Lanes<kLanes>::save(data + i, curve<kLanes>(Lanes<kLanes>::load(data + i), act));
  if (i == n) return;
  const int rest = static_cast<int>(n - i);
  MaskedMemory<kLanes>::save(data + i, rest, curve<kLanes>(MaskedMemory<kLanes>::load(data + i, rest), act));
}

// Pixels in lanes; kVecs accumulators hide the latency of the sum.
template <int kLanes, int kVecs>
inline __attribute__((always_inline)) void flat_block(const DepthwiseFlat& f, int64_t q) {
  using S = Lanes<kLanes>;
  using Vec = typename S::Vec;
  Vec acc[kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) acc[i] = Vec{};
  for (int64_t tap = 0; tap < f.taps; ++tap) {
    const float w = f.weight[tap * f.tap_stride];
    const float* x = f.x + f.offset[tap] + q;
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) acc[i] += S::load(x + i * kLanes) * w;
  }
  const Vec low = Vec{} + f.epilogue.low, high = Vec{} + f.epilogue.high;
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) {
    Vec v = acc[i] * f.scale + (Vec{} + f.shift);
    if (f.residual != nullptr) v += S::load(f.residual + q + i * kLanes);
    S::save(f.out + q + i * kLanes, clamp(v, low, high));
  }
}

template <int kLanes>
void flat(const DepthwiseFlat& f) {
  int64_t q = 0;
  if constexpr (kLanes >= 8)
    for (; q + 64 <= f.length; q += 64) flat_block<kLanes, 64 / kLanes>(f, q);
  for (; q < f.length; q += 16) flat_block<kLanes, 16 / kLanes>(f, q);
  if (is_curve(f.epilogue.act)) curve_line<kLanes>(f.out, f.length, f.epilogue.act);
}

template <int kLanes>
void copy(float* to, int64_t to_pitch, const float* from, int64_t from_pitch, int64_t rows, int64_t n) {
  using S = Lanes<kLanes>;
  for (int64_t r = 0; r < rows; ++r, to += to_pitch, from += from_pitch) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) S::save(to + i, S::load(from + i));
    if (i < n) {
      const int rest = static_cast<int>(n - i);
      MaskedMemory<kLanes>::save(to + i, rest, MaskedMemory<kLanes>::load(from + i, rest));
    }
  }
}

template <int kLanes>
void evens(float* to, int64_t to_pitch, const float* from, int64_t from_pitch, int64_t rows, int64_t n) {
  using S = Lanes<kLanes>;
  typename S::Int even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  for (int64_t r = 0; r < rows; ++r, to += to_pitch, from += from_pitch) {
    int64_t i = 0;
    for (; i + kLanes < n; i += kLanes)  // the last float is not part of the row if n is not
      S::save(to + i, __builtin_shuffle(S::load(from + 2 * i), S::load(from + 2 * i + kLanes), even));
    for (; i < n; ++i) to[i] = from[2 * i];
  }
}

template <int kLanes, int kKernel, int kStride>
constexpr void shapes(DepthwiseKernel (&row)[kDepthwiseRows][kDepthwiseWidths]) {
  row[0][0] = shaped<kLanes, kKernel, kStride, 1, 7>, row[1][0] = shaped<kLanes, kKernel, kStride, 2, 7>;
  row[0][1] = shaped<kLanes, kKernel, kStride, 1, 4>, row[1][1] = shaped<kLanes, kKernel, kStride, 2, 4>;
  row[0][2] = shaped<kLanes, kKernel, kStride, 1, 2>, row[1][2] = shaped<kLanes, kKernel, kStride, 2, 2>;
  row[0][3] = shaped<kLanes, kKernel, kStride, 1, 1>, row[1][3] = shaped<kLanes, kKernel, kStride, 2, 1>;
}

template <int kLanes>
constexpr DepthwiseKernels depthwise_kernels_of() {
  DepthwiseKernels k{};
  if constexpr (kLanes < 16) {  // wider vectors come with the registers for sweeps
    shapes<kLanes, 3, 1>(k.tile[0][0]);
    shapes<kLanes, 3, 2>(k.tile[0][1]);
  }
  shapes<kLanes, 5, 1>(k.tile[1][0]);
  shapes<kLanes, 5, 2>(k.tile[1][1]);
  k.any[0] = any<kLanes, 7>, k.any[1] = any<kLanes, 4>, k.any[2] = any<kLanes, 2>, k.any[3] = any<kLanes, 1>;
  k.flat = flat<kLanes>, k.curve = curve_line<kLanes>, k.copy = copy<kLanes>, k.evens = evens<kLanes>;
  return k;
}
