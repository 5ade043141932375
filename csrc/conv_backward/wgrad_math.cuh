// The inner product of a warp's tile of the weight's gradient over one stage. Both operands lie pixel by pixel, so
// fragments of 16 bits come by transposed ldmatrix; that moves pairs of bytes, so those of 32 bits are loaded one by
// one, and fp32 without tensor cores takes rows of both as they lie.
#pragma once

#include "../conv/fragments.cuh"
#include "wgrad_loader.cuh"

namespace effkern::conv::gpu {

// Four sums of a row, where that row and these columns are there.
template <class C>
struct WgradTo {
  Global<float> parts;  // of the tile's first element
  int32_t rows, columns;
  int64_t pitch;
  __device__ __forceinline__ void store(int m, int n, const Vec<float, 4>& sums) const {
    if (m < rows && n < columns) device::store(parts + (m * pitch + n), sums);
  }
};

template <class C>
class WgradTensorCore {
 public:
  static constexpr int kM = C::kWarpM / 16, kN = C::kWarpN / 8;
  static constexpr bool kWide = C::kMath == Math::TF32;
  static_assert(kN % 2 == 0);

  __device__ WgradTensorCore(int warp_m, int warp_n) : m_(warp_m), n_(warp_n) {
    const int lane = device::lane();
    if constexpr (kWide) {
      const int g = lane / 4, t = lane % 4;
      a_ = t * C::kRowA + ((warp_m / 4 + g / 4) ^ reversed(t)) * 16 + g % 4 * 4;
      b_ = C::kDepth * C::kRowA + t * C::kRowB + ((warp_n / 4 + g / 4) ^ reversed(t)) * 16 + g % 4 * 4;
    } else {
      const int row = lane % 8, matrix = lane / 8;
      a_ = (matrix / 2 * 8 + row) * C::kRowA + ((warp_m / 8 + matrix % 2) ^ reversed(row)) * 16;
      b_ = C::kDepth * C::kRowA + (matrix % 2 * 8 + row) * C::kRowB + ((warp_n / 8 + matrix / 2) ^ reversed(row)) * 16;
    }
  }

  __device__ __forceinline__ void multiply(Shared<char> stage) {
    constexpr int kK = kWide ? 8 : 16;
#pragma unroll
    for (int k = 0; k < C::kDepth; k += kK) {
      uint32_t a[kM][4], b[kN][2];
      if constexpr (kWide) {
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int r = 0; r < 4; ++r)  // row g + 8 * (r % 2), pixel t + 4 * (r / 2)
            a[i][r] = word(stage + ((a_ ^ (i * 64 + r % 2 * 32 + r / 2 * 16)) + (k + r / 2 * 4) * C::kRowA));
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r) b[j][r] = word(stage + ((b_ ^ (j * 32 + r * 16)) + (k + r * 4) * C::kRowB));
      } else {
#pragma unroll
        for (int i = 0; i < kM; ++i) device::load_matrix_x4_transposed(a[i], stage + ((a_ ^ i * 32) + k * C::kRowA));
#pragma unroll
        for (int j = 0; j < kN; j += 2) {
          uint32_t both[4];
          device::load_matrix_x4_transposed(both, stage + ((b_ ^ j * 16) + k * C::kRowB));
          b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
        }
      }
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j) multiply_fragment<C::kMath>(sums_[i][j], a[i], b[j]);
    }
  }

  // A lane holds two sums of a row and two of the eighth behind it: neighbours exchange them, so that each stores four
  // of one row.
  __device__ __forceinline__ void store(const WgradTo<C>& to) const {
    const int g = device::lane() / 4, t = device::lane() % 4;
    const bool odd = t % 2 != 0;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float (&s)[4] = sums_[i][j];
        const float first = device::shuffle_xor(odd ? s[0] : s[2], 1),
                    second = device::shuffle_xor(odd ? s[1] : s[3], 1);
        const Vec<float, 4> row =
            odd ? Vec<float, 4>{{first, second, s[2], s[3]}} : Vec<float, 4>{{s[0], s[1], first, second}};
        to.store(m_ + i * 16 + g + (odd ? 8 : 0), n_ + j * 8 + t / 2 * 4, row);
      }
  }

 private:
  __device__ static __forceinline__ uint32_t word(Shared<char> from) {
    return device::round_tf32(device::load<uint32_t>(from));
  }

  float sums_[kM][kN][4] = {};
  int m_, n_, a_, b_;
};

template <class C>
class WgradFmas {
 public:
  static constexpr int kLanesM = 8, kLanesN = 4, kM = C::kWarpM / (kLanesM * 4), kN = C::kWarpN / (kLanesN * 4);
  static_assert(kM * kLanesM * 4 == C::kWarpM && kN * kLanesN * 4 == C::kWarpN);

  __device__ WgradFmas(int warp_m, int warp_n) {
    const int m = device::lane() / kLanesN, n = device::lane() % kLanesN;
    m_ = warp_m + m * 4, n_ = warp_n + n * 4;
    a_ = m_ * 4, b_ = C::kDepth * C::kRowA + n_ * 4;
  }

  __device__ __forceinline__ void multiply(Shared<char> stage) {
#pragma unroll
    for (int k = 0; k < C::kDepth; ++k) {
      const int flip = reversed(k) * 16;
      Vec<float, 4> a[kM], b[kN];
#pragma unroll
      for (int i = 0; i < kM; ++i)
        a[i] = device::load<Vec<float, 4>>(stage + ((a_ ^ flip) + i * kLanesM * 16 + k * C::kRowA));
#pragma unroll
      for (int j = 0; j < kN; ++j)
        b[j] = device::load<Vec<float, 4>>(stage + ((b_ ^ (flip ^ j * kLanesN * 16)) + k * C::kRowB));
#pragma unroll
      for (int i = 0; i < kM * 4; ++i)
#pragma unroll
        for (int j = 0; j < kN * 4; ++j) sums_[i][j] = device::fma(a[i / 4].v[i % 4], b[j / 4].v[j % 4], sums_[i][j]);
    }
  }

  __device__ __forceinline__ void store(const WgradTo<C>& to) const {
#pragma unroll
    for (int i = 0; i < kM * 4; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
        to.store(m_ + i / 4 * kLanesM * 4 + i % 4, n_ + j * kLanesN * 4,
                 Vec<float, 4>{{sums_[i][j * 4], sums_[i][j * 4 + 1], sums_[i][j * 4 + 2], sums_[i][j * 4 + 3]}});
  }

 private:
  float sums_[kM * 4][kN * 4] = {};
  int m_, n_, a_, b_;
};

}  // namespace effkern::conv::gpu
