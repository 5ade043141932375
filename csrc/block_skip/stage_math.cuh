// Sums of a 3x3 convolution over a map in shared memory: 256 threads hold all of them in registers. Terms come in the
// order of the convolution (conv_math.cuh), tap by tap and channel by channel, so either gives the same bits.
#pragma once

#include "../conv/fragments.cuh"
#include "stage_gpu.h"

namespace effkern::block_skip {

using device::Shared;
using device::Vec;

// Where a map's pixel lies: before its border's offset, that is at its first tap.
struct StageMap {
  int32_t w, pixels, pitch;
  __device__ __forceinline__ int32_t place(int32_t pixel) const { return (pixel / w * (w + 1) + pixel % w) * pitch; }
};

template <Math kMath, class T, int kC>
class StageTensorCore {
 public:
  static constexpr int kPair = 2, kPitch = kC * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kWarps = kStageThreads / 32, kWarpsN = kC == 64 ? 2 : 1, kWarpsM = kWarps / kWarpsN;
  static constexpr int kN = kC / 8 / kWarpsN, kM = kC == 16 ? 8 : kC == 32 ? 2 : 1;

  __device__ explicit StageTensorCore(const StageMap& map) : map_(map) {
    const int warp = device::thread() / 32, lane = device::lane();
    first_ = warp / kWarpsN * 16, column_ = warp % kWarpsN * kN * 8;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      const int32_t pixel = first_ + i * kWarpsM * 16 + lane % 16;
      a_[i] = (pixel < map.pixels ? map.place(pixel) : 0) + lane / 16 * 16;  // rows past the map are not stored
    }
    b_ = (column_ + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
    live_ = first_ >= map.pixels ? 0 : (map.pixels - first_ - 1) / (kWarpsM * 16) + 1;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) sums_[i][j][r] = 0.0f;
  }

  // One tap: the map moved by it, and its weights [channels out][channels in].
  __device__ __forceinline__ void multiply(Shared<char> a, Shared<char> b) {
#pragma unroll
    for (int k = 0; k < kC * static_cast<int>(sizeof(T)) / 32; ++k) {
      uint32_t weights[kN][2];
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        uint32_t both[4];
        device::load_matrix_x4(both, b + (b_ + j * 8 * kPitch + k * 32));
        weights[j][0] = both[0], weights[j][1] = both[1], weights[j + 1][0] = both[2], weights[j + 1][1] = both[3];
      }
      if constexpr (kMath == Math::TF32) {
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r) weights[j][r] = device::round_tf32(weights[j][r]);
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        if (i >= live_) break;
        uint32_t pixels[4];
        device::load_matrix_x4(pixels, a + (a_[i] + k * 32));
        if constexpr (kMath == Math::TF32) {
#pragma unroll
          for (int r = 0; r < 4; ++r) pixels[r] = device::round_tf32(pixels[r]);
        }
#pragma unroll
        for (int j = 0; j < kN; ++j) conv::gpu::multiply_fragment<kMath>(sums_[i][j], pixels, weights[j]);
      }
    }
  }

  // f(place of the pixel, first channel, two sums) for all sums of the thread.
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t pixel = first_ + i * kWarpsM * 16 + device::lane() / 4 + half * 8;
        if (pixel >= map_.pixels) continue;
        const int32_t place = map_.place(pixel);
#pragma unroll
        for (int j = 0; j < kN; ++j)
          f(place, column_ + j * 8 + device::lane() % 4 * 2,
            Vec<float, 2>{{sums_[i][j][2 * half], sums_[i][j][2 * half + 1]}});
      }
    }
  }

 private:
  const StageMap map_;
  int32_t first_, column_, live_, a_[kM], b_;
  float sums_[kM][kN][4];
};

template <int kC>
class StageFmas {
 public:
  static constexpr int kPair = 1, kPitch = kC * 4 + 16;
  // A thread's channels are kGroups apart and its pixels kLanes, so that neighbours read rows side by side.
  static constexpr int kGroups = kC / 8, kLanes = kStageThreads / kGroups;
  static constexpr int kPixels = (kC == 16 ? 1024 : kC == 32 ? 256 : 64) / kLanes;

  __device__ explicit StageFmas(const StageMap& map) : map_(map) {
    group_ = device::thread() % kGroups, first_ = device::thread() / kGroups;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int32_t pixel = first_ + i * kLanes;
      a_[i] = pixel < map.pixels ? map.place(pixel) : 0;
    }
    live_ = first_ >= map.pixels ? 0 : (map.pixels - first_ - 1) / kLanes + 1;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) sums_[i][j] = 0.0f;
  }

  __device__ __forceinline__ void multiply(Shared<char> a, Shared<char> b) {
    if (live_ == 0) return;
#pragma unroll 1
    for (int chunk = 0; chunk < kC / 4; ++chunk) {
      Vec<float, 4> weights[8];
#pragma unroll
      for (int j = 0; j < 8; ++j)
        weights[j] = device::load<Vec<float, 4>>(b + ((group_ + j * kGroups) * kPitch + chunk * 16));
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        if (i >= live_) break;
        const auto pixel = device::load<Vec<float, 4>>(a + (a_[i] + chunk * 16));
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int j = 0; j < 8; ++j) sums_[i][j] = device::fma(pixel.v[k], weights[j].v[k], sums_[i][j]);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (i >= live_) break;
#pragma unroll
      for (int j = 0; j < 8; ++j) f(a_[i], group_ + j * kGroups, Vec<float, 1>{{sums_[i][j]}});
    }
  }

 private:
  const StageMap map_;
  int32_t group_, first_, live_, a_[kPixels];
  float sums_[kPixels][8];
};

}  // namespace effkern::block_skip
