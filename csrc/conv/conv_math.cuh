// The inner product of a warp's tile over one stage, and how a lane's sums lie in it. TensorCore: mma.sync on fragments
// by ldmatrix, the same addresses for 16-bit and tf32, because a K step of either is 32 bytes. Fmas: fp32 without
// tensor cores, each lane a grid of rows and columns. Sums run over K in ascending order, whatever the tile: results do
// not depend on its size.
#pragma once

#include "conv_loader.cuh"
#include "fragments.cuh"

namespace effkern::conv::gpu {

constexpr int kStrip = 16;  // rows of the warp's tile the epilogue takes at a time

template <class C>
class TensorCore {
 public:
  static constexpr int kM = C::kWarpM / 16, kN = C::kWarpN / 8;
  static_assert(kM * 16 == C::kWarpM && kN % 2 == 0 && kN * 8 == C::kWarpN);
  // Floats from row to row of a staged strip: the rows a half-warp writes fall on different banks.
  static constexpr int kPitch = C::kWarpN + 8;

  __device__ TensorCore(int warp_m, int warp_n) {
    const int lane = device::lane();
    a_ = swizzled(warp_m + lane % 16, lane / 16);
    b_ = C::kTileM * kRowBytes + swizzled(warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  __device__ __forceinline__ void multiply(Shared<char> stage) {
#pragma unroll
    for (int k = 0; k < kRowBytes / 32; ++k) {
      const int flip = k * 32;  // the second half's chunks are two further, and the swizzle is a XOR
      uint32_t a[kM][4], b[kN][2];
#pragma unroll
      for (int i = 0; i < kM; ++i) device::load_matrix_x4(a[i], stage + ((a_ ^ flip) + i * 16 * kRowBytes));
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        uint32_t both[4];
        device::load_matrix_x4(both, stage + ((b_ ^ flip) + j * 8 * kRowBytes));
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
      }
      if constexpr (C::kMath == Math::TF32) {
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int r = 0; r < 4; ++r) a[i][r] = device::round_tf32(a[i][r]);
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r) b[j][r] = device::round_tf32(b[j][r]);
      }
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j) multiply_fragment<C::kMath>(sums_[i][j], a[i], b[j]);
    }
  }

  // Rows 16 * strip on, as [16][kPitch] floats.
  __device__ __forceinline__ void stage(int strip, Shared<float> to) const {
    const int row = device::lane() / 4, column = device::lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        device::store(to + ((row + half * 8) * kPitch + j * 8 + column),
                      Vec<float, 2>{{sums_[strip][j][2 * half], sums_[strip][j][2 * half + 1]}});
  }

 private:
  float sums_[kM][kN][4] = {};
  int a_, b_;
};

template <class C>
class Fmas {
 public:
  static constexpr int kLanesM = 8, kLanesN = 4, kM = C::kWarpM / kLanesM, kN = C::kWarpN / kLanesN;
  static constexpr int kPitch = C::kWarpN + 4;
  static constexpr int kRowsOfStrip = kStrip / kLanesM;

  __device__ Fmas(int warp_m, int warp_n)
      : m_(device::lane() / kLanesN), n_(device::lane() % kLanesN), a_(warp_m + m_), b_(warp_n + n_) {}

  __device__ __forceinline__ void multiply(Shared<char> stage) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int a_at = swizzled(a_, chunk);
      Vec<float, 4> b[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j)
        b[j] = device::load<Vec<float, 4>>(stage + (C::kTileM * kRowBytes + swizzled(b_ + j * kLanesN, chunk)));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        const auto a = device::load<Vec<float, 4>>(stage + (a_at + i * kLanesM * kRowBytes));
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int j = 0; j < kN; ++j) sums_[i][j] = device::fma(a.v[k], b[j].v[k], sums_[i][j]);
      }
    }
  }

  __device__ __forceinline__ void stage(int strip, Shared<float> to) const {
#pragma unroll
    for (int i = 0; i < kRowsOfStrip; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
        device::store(to + ((m_ + i * kLanesM) * kPitch + n_ + j * kLanesN), sums_[strip * kRowsOfStrip + i][j]);
  }

 private:
  const int m_, n_, a_, b_;
  float sums_[kM][kN] = {};
};

}  // namespace effkern::conv::gpu
