// The 3x3 depthwise inner loop for sets with 32 registers: the inputs under the kernel stay in registers while it moves
// along the rows, so that an input is loaded once for all outputs of a strip and nothing has to stay in the L1 cache,
// where the pixels of maps of 512 or 1024 channels evict each other. Included by depthwise_impl.h; includes nothing
// itself.

// The inputs under the kernel, at all rows of a strip: a sum is over the taps in ascending order.
template <int kLanes, int kStride, int kRows, bool kMasked>
struct SweepWindow {
  using Vec = typename Lanes<kLanes>::Vec;
  static constexpr int kInRows = (kRows - 1) * kStride + 3;
  Vec left[kInRows], middle[kInRows], right[kInRows];
  const float* in[kInRows];  // the next column

  // Loads the next column, zeros if it is outside of the map.
  inline __attribute__((always_inline)) void load(Vec (&column)[kInRows], const DepthwiseSweep& s, bool inside,
                                                  Memory<kLanes, kMasked> memory) {
#pragma GCC unroll 9
    for (int r = 0; r < kInRows; ++r) {
      column[r] = Vec{};
      if (!inside) continue;
      column[r] = memory.load(in[r]);
      in[r] += s.in_step[r];
    }
  }

  inline __attribute__((always_inline)) void shift() {
#pragma GCC unroll 9
    for (int r = 0; r < kInRows; ++r) {
      left[r] = kStride == 1 ? middle[r] : right[r];
      if (kStride == 1) middle[r] = right[r];
    }
  }

  inline __attribute__((always_inline)) Vec sum(int row, const Vec (&weight)[9]) const {
    Vec acc{};
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky) {
      acc += left[row * kStride + ky] * weight[3 * ky];
      acc += middle[row * kStride + ky] * weight[3 * ky + 1];
      acc += right[row * kStride + ky] * weight[3 * ky + 2];
    }
    return acc;
  }
};

// What the store of a strip does besides adding the shift and clamping: nothing, write past the caches, or whatever it
// is told to.
enum class SweepStore { Plain, Stream, Full };

// Lanes c to c + n of all outputs of the strip.
template <int kLanes, int kStride, int kRows, bool kMasked, SweepStore kStore>
inline __attribute__((always_inline)) void sweep_block(const DepthwiseSweep& s, int64_t c, int n, const char*& ahead) {
  using Vec = typename Lanes<kLanes>::Vec;
  const Memory<kLanes, kMasked> memory{n};
  SweepWindow<kLanes, kStride, kRows, kMasked> window;
  constexpr int kInRows = window.kInRows;
  Vec weight[9];
#pragma GCC unroll 9
  for (int tap = 0; tap < 9; ++tap) weight[tap] = memory.load(s.weight + tap * s.tap_stride + c);
  const Vec scale = s.scale != nullptr ? memory.load(s.scale + c) : Vec{}, shift = memory.load(s.shift + c);
  const Vec low = Vec{} + s.epilogue.low, high = Vec{} + s.epilogue.high;
  int64_t column = s.first;  // the next to be loaded
#pragma GCC unroll 9
  for (int r = 0; r < kInRows; ++r) window.in[r] = s.in[r] + c + (column > 0 ? column : 0) * s.in_step[r];
  window.load(window.left, s, column >= 0 && column < s.width, memory), ++column;
  if (kStride == 1) window.load(window.middle, s, column >= 0 && column < s.width, memory), ++column;
  float* out = s.out + c;
  const float* residual = s.residual != nullptr ? s.residual + c : nullptr;
  const auto finish_column = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      Vec v = window.sum(row, weight);
      v = kStore == SweepStore::Full && s.scale != nullptr ? v * scale + shift : v + shift;
      if (kStore == SweepStore::Full && residual != nullptr) v += memory.load(residual + row * s.residual_row);
      v = clamp(v, low, high);
      if (!kMasked && (kStore == SweepStore::Stream || (kStore == SweepStore::Full && s.stream)))
        MaskedMemory<kLanes>::stream(out + row * s.out_row, v);
      else
        memory.save(out + row * s.out_row, v);
    }
    out += s.out_step;
    if (kStore == SweepStore::Full && residual != nullptr) residual += s.residual_step;
    window.shift();
  };
  const int64_t inside = (s.width - column) / kStride, whole = inside < 0 ? 0 : inside < s.columns ? inside : s.columns;
  int64_t j = 0;
  for (; j < whole; ++j) {
    if (kStride == 2) window.load(window.middle, s, true, memory);
    window.load(window.right, s, true, memory);
    if (ahead != nullptr) {
#pragma GCC unroll 16
      for (int line = 0; line < kRows * kStride * kStride; ++line) __builtin_prefetch(ahead + line * kLanes * 4, 0, 2);
      ahead += kRows * kStride * kStride * kLanes * 4;
    }
    finish_column();
  }
  column += whole * kStride;
  for (; j < s.columns; ++j) {
    if (kStride == 2) window.load(window.middle, s, column < s.width, memory), ++column;
    window.load(window.right, s, column < s.width, memory), ++column;
    finish_column();
  }
}

template <int kLanes, int kStride, int kRows>
void sweep(const DepthwiseSweep& s) {
  const char* ahead = s.ahead;
  const int64_t whole = s.channels / kLanes * kLanes;
  if (s.scale != nullptr || s.residual != nullptr)
    for (int64_t c = 0; c < whole; c += kLanes)
      sweep_block<kLanes, kStride, kRows, false, SweepStore::Full>(s, c, kLanes, ahead);
  else if (s.stream)
    for (int64_t c = 0; c < whole; c += kLanes)
      sweep_block<kLanes, kStride, kRows, false, SweepStore::Stream>(s, c, kLanes, ahead);
  else
    for (int64_t c = 0; c < whole; c += kLanes)
      sweep_block<kLanes, kStride, kRows, false, SweepStore::Plain>(s, c, kLanes, ahead);
  if (whole < s.channels)
    sweep_block<kLanes, kStride, kRows, true, SweepStore::Full>(s, whole, static_cast<int>(s.channels - whole), ahead);
}

template <int kLanes>
constexpr DepthwiseKernels with_sweeps(DepthwiseKernels k) {
  k.sweep[0][0] = sweep<kLanes, 1, 1>, k.sweep[0][1] = sweep<kLanes, 1, 2>, k.sweep[0][2] = sweep<kLanes, 1, 3>;
  k.sweep[0][3] = sweep<kLanes, 1, 4>;
  k.sweep[1][0] = sweep<kLanes, 2, 1>, k.sweep[1][1] = sweep<kLanes, 2, 2>, k.sweep[1][2] = sweep<kLanes, 2, 3>;
  k.fence = MaskedMemory<kLanes>::fence;
  return k;
}
