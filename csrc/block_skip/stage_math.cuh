// Sums of a 3x3 convolution over a map in shared memory: a thread block holds all of them in registers. Terms come in
// the order of the convolution (conv_math.cuh), tap by tap and channel by channel, so either gives the same bits.
#pragma once

#include "../conv/fragments.cuh"
#include "stage_gpu.h"

namespace effkern::block_skip {

using device::Shared;
using device::Vec;

template <class T, int kC>
constexpr int kStagePitch = kC * static_cast<int>(sizeof(T)) + 16;  // stage_shape's

// Where a map's pixel lies: before its border's offset, that is at its first tap.
struct StageMap {
  int32_t h, w, pitch;
  __device__ __forceinline__ int32_t pixels() const { return h * w; }
  __device__ __forceinline__ int32_t row() const { return (w + 1) * pitch; }  // bytes from a pixel to the one below
  __device__ __forceinline__ int32_t place(int32_t pixel) const { return pixel / w * row() + pixel % w * pitch; }
};

template <Math kMath>
__device__ __forceinline__ void load_fragment(uint32_t (&to)[4], Shared<char> from) {
  device::load_matrix_x4(to, from);
  if constexpr (kMath == Math::TF32) {
#pragma unroll
    for (int r = 0; r < 4; ++r) to[r] = device::round_tf32(to[r]);
  }
}

// The products of a fragment of pixels and one of weights: 16 channels out, two tiles of sums.
template <Math kMath>
__device__ __forceinline__ void multiply_pair(float (&sums)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
  conv::gpu::multiply_fragment<kMath>(sums[0], a, low);
  conv::gpu::multiply_fragment<kMath>(sums[1], a, high);
}

// Where a lane's row of a fragment begins: 16 pixels by 32 bytes of their channels, 16 channels out by 32 bytes in.
__device__ __forceinline__ int32_t half_of_pixels() { return device::lane() / 16 * 16; }
template <int kPitch>
__device__ __forceinline__ int32_t row_of_weights() {
  return (device::lane() % 8 + device::lane() / 16 * 8) * kPitch + device::lane() / 8 % 2 * 16;
}

// 16 channels. A warp's outputs are up to eight pixels below one another in 16 columns. It holds the weights of all
// taps, and a row of inputs, once loaded, serves the three rows of outputs around it: 30 fragments of pixels in place
// of 72, and each output still meets its taps in order.
template <Math kMath, class T>
class StageColumns {
 public:
  static constexpr int kC = 16, kSize = sizeof(T), kPair = 2, kPitch = kStagePitch<T, kC>;
  static constexpr int kN = 2, kRows = kMostRows;
  static constexpr int kSteps = kC * kSize / 32;  // of K in a tap
  static_assert(stage_threads(kC) / 32 * 16 == kMostColumns);

  __device__ explicit StageColumns(const StageMap& map) : map_(map) {
    const int32_t first = device::thread() / 32 * 16;
    // Groups of rows lie side by side, the last one as low as the map goes.
    rows_ = rows_of_columns(map.h, map.w);
#pragma unroll
    for (int half = 0; half < 2; ++half) out_[half] = column(first + half * 8 + device::lane() / 4);
    a_ = column(first + device::lane() % 16).place + half_of_pixels();
    if (first / map.w * rows_ >= map.h) rows_ = 0;  // no column of the warp
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) sums_[i][j][r] = 0.0f;
  }

  // All taps: the map, and their weights [tap][channels out][channels in].
  template <int kTaps>
  __device__ __forceinline__ void multiply(Shared<char> map, Shared<char> weights) {
    static_assert(kTaps == 9);
    if (rows_ == 0) return;
    Weights b;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
        load_fragment<kMath>(b[tap][k], weights + row_of_weights<kPitch>() + (tap * kC * kPitch + k * 32));
    Inputs a[2];  // of two rows, in turn
    load(a[0], map + a_);
    add_rows<0>(map + a_, a, b);
  }

  // The j-th channels of the thread's sums: this one and the next.
  __device__ __forceinline__ int32_t channel(int j) const { return j * 8 + device::lane() % 4 * 2; }

  // f(place of the pixel, j, two sums) for all sums of the thread.
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows_) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (i < out_[half].first) continue;
#pragma unroll
        for (int j = 0; j < kN; ++j)
          f(out_[half].place + i * map_.row(), j, Vec<float, 2>{{sums_[i][j][2 * half], sums_[i][j][2 * half + 1]}});
      }
    }
  }

 private:
  using Weights = uint32_t[9][kSteps][4];
  using Inputs = uint32_t[3][kSteps][4];  // of the taps of a row

  // Where a column of outputs begins, and the first row of it that no column above has.
  struct Column {
    int32_t place, first;
  };
  __device__ Column column(int32_t i) const {
    const int32_t y = i / map_.w * rows_, top = y < map_.h - rows_ ? y : map_.h - rows_;
    if (y >= map_.h) return {0, kRows};  // reads what is there, stores nothing
    return {top * map_.row() + i % map_.w * map_.pitch, y - top};
  }

  __device__ __forceinline__ static void load(Inputs& a, Shared<char> at) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap)
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_fragment<kMath>(a[tap][k], at + (tap * kPitch + k * 32));
  }

  // Rows of the inputs from row i on, which is loaded.
  template <int i>
  __device__ __forceinline__ void add_rows(Shared<char> at, Inputs (&a)[2], const Weights& b) {
    load(a[(i + 1) % 2], at + map_.row());
    if constexpr (i < kRows) {
      if (i < rows_) {
        add<0>(i, a[i % 2], b);
        add_rows<i + 1>(at + map_.row(), a, b);
        return;
      }
    }
    add<1>(i, a[i % 2], b);  // below the last outputs
    add<2>(i + 1, a[(i + 1) % 2], b);
  }

  // Row i of the inputs, to the outputs whose tap it is, from row kFrom of the taps on.
  template <int kFrom>
  __device__ __forceinline__ void add(int i, const Inputs& a, const Weights& b) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap)
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int row = kFrom; row < 3; ++row)
          if (i >= row && i - row < kRows) multiply_pair<kMath>(sums_[i - row], a[tap][k], b[row * 3 + tap][k]);
  }

  const StageMap map_;
  int32_t rows_, a_;
  Column out_[2];
  float sums_[kRows][2][4];
};

// 32 and 64 channels: a warp's outputs are 32 pixels in the order of the map by 32 channels.
template <Math kMath, class T, int kC>
class StageTiles {
 public:
  static constexpr int kSize = sizeof(T), kPair = 2, kPitch = kStagePitch<T, kC>;
  static constexpr int kWarpsN = kC / 32, kM = 2, kN = 4;
  static_assert(stage_threads(kC) / 32 / kWarpsN * kM * 16 == most_pixels(kC));

  __device__ explicit StageTiles(const StageMap& map) : map_(map) {
    const int warp = device::thread() / 32;
    first_ = warp / kWarpsN * (kM * 16), column_ = warp % kWarpsN * (kN * 8);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      const int32_t pixel = first_ + i * 16 + device::lane() % 16;
      a_[i] = (pixel < map.pixels() ? map.place(pixel) : 0) + half_of_pixels();  // rows past the map are not stored
    }
    b_ = column_ * kPitch + row_of_weights<kPitch>();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) sums_[i][j / 2][j % 2][r] = 0.0f;
  }

  // kTaps taps of a row: the map moved by the first of them, and their weights [tap][channels out][channels in].
  template <int kTaps>
  __device__ __forceinline__ void multiply(Shared<char> map, Shared<char> weights) {
    static_assert(kTaps <= 3);
    if (first_ >= map_.pixels()) return;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
      for (int k = 0; k < kC * kSize / 32; ++k) {
        uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
        for (int j = 0; j < kN / 2; ++j)
          load_fragment<kMath>(b[j], weights + b_ + ((tap * kC + j * 16) * kPitch + k * 32));
#pragma unroll
        for (int i = 0; i < kM; ++i) load_fragment<kMath>(a[i], map + a_[i] + (tap * kPitch + k * 32));
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int j = 0; j < kN / 2; ++j) multiply_pair<kMath>(sums_[i][j], a[i], b[j]);
      }
  }

  __device__ __forceinline__ int32_t channel(int j) const { return column_ + j * 8 + device::lane() % 4 * 2; }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t pixel = first_ + i * 16 + device::lane() / 4 + half * 8;
        if (pixel >= map_.pixels()) continue;
        const int32_t place = map_.place(pixel);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const float (&sum)[4] = sums_[i][j / 2][j % 2];
          f(place, j, Vec<float, 2>{{sum[2 * half], sum[2 * half + 1]}});
        }
      }
    }
  }

 private:
  const StageMap map_;
  int32_t first_, column_, a_[kM], b_;
  float sums_[kM][kN / 2][2][4];
};

template <int kC>
class StageFmas {
 public:
  static constexpr int kN = 8, kPair = 1, kPitch = kStagePitch<float, kC>;
  // A thread's channels are kGroups apart and its pixels kLanes, so that neighbours read rows side by side.
  static constexpr int kGroups = kC / 8, kLanes = stage_threads(kC) / kGroups;
  static constexpr int kPixels = most_pixels(kC) / kLanes;

  __device__ explicit StageFmas(const StageMap& map) : map_(map) {
    group_ = device::thread() % kGroups, first_ = device::thread() / kGroups;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int32_t pixel = first_ + i * kLanes;
      a_[i] = pixel < map.pixels() ? map.place(pixel) : 0;
    }
    live_ = first_ >= map.pixels() ? 0 : (map.pixels() - first_ - 1) / kLanes + 1;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) sums_[i][j] = 0.0f;
  }

  template <int kTaps>
  __device__ __forceinline__ void multiply(Shared<char> map, Shared<char> weights) {
    if (live_ == 0) return;
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      const Shared<char> a = map + (tap / 3 * map_.row() + tap % 3 * kPitch), b = weights + tap * kC * kPitch;
#pragma unroll 1
      for (int chunk = 0; chunk < kC / 4; ++chunk) add(a + chunk * 16, b + chunk * 16);
    }
  }

  __device__ __forceinline__ int32_t channel(int j) const { return group_ + j * kGroups; }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (i >= live_) break;
#pragma unroll
      for (int j = 0; j < kN; ++j) f(a_[i], j, Vec<float, 1>{{sums_[i][j]}});
    }
  }

 private:
  // Four channels in.
  __device__ __forceinline__ void add(Shared<char> a, Shared<char> b) {
    Vec<float, 4> weights[8];
#pragma unroll
    for (int j = 0; j < kN; ++j) weights[j] = device::load<Vec<float, 4>>(b + channel(j) * kPitch);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (i >= live_) break;
      const auto pixel = device::load<Vec<float, 4>>(a + a_[i]);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < kN; ++j) sums_[i][j] = device::fma(pixel.v[k], weights[j].v[k], sums_[i][j]);
    }
  }

  const StageMap map_;
  int32_t group_, first_, live_, a_[kPixels];
  float sums_[kPixels][8];
};

}  // namespace effkern::block_skip
