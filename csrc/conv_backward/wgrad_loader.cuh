// Brings the operands of the weight's gradient into shared memory, one block of pixels a stage, as they lie in memory:
// a row a pixel, A the channels of gz, B for each tap the channels of x under it. Both are zero past the channels, past
// the slice's pixels and in the padding, because 0 * NaN is NaN. A thread stays in one row of the stage, so it walks
// one pixel; chunk c of row r lies at c ^ (r's three low bits reversed): copies, transposed ldmatrix and 32-bit loads
// of fragments then touch all banks once.
#pragma once

#include "../common/cuda/columns.cuh"
#include "../common/cuda/indices.cuh"
#include "backward_gpu.h"

namespace effkern::conv::gpu {

using device::Shared;
using device::Vec;

__device__ __forceinline__ int reversed(int row) { return (row & 1) << 2 | (row & 2) | (row >> 2 & 1); }

// Where a block's tile lies.
struct WgradTile {
  int32_t m, n, group, slice;
  int32_t begin = 0, pixels = 0;  // of all entries: the first, how many
};

template <class C>
class WgradLoader {
 public:
  using T = typename C::T;
  static constexpr int kPer = device::kPerChunk<T>, kSize = sizeof(T);
  static constexpr int kPerRow = C::kThreads / C::kDepth;  // threads of a row
  static constexpr int kA = C::kTileM / kPer / kPerRow, kB = C::kTileN / kPer / kPerRow;
  static_assert(kA * kPerRow * kPer == C::kTileM && kB * kPerRow * kPer == C::kTileN);
  static constexpr int kFar = kPerRow * 16;        // bytes from one chunk of a thread to the next
  static constexpr int32_t kNowhere = -(1 << 30);  // outside of every map
  static_assert(kPerRow == 4 || kPerRow == 8);
  static_assert(kPerRow == 8 || (kA % 2 == 0 && kB % 2 == 0));

  __device__ WgradLoader(const Wgrad<T>& p, const WgradTile& tile) : p_(p) {
    const int row = device::thread() / kPerRow, q = device::thread() % kPerRow;
    // A thread fills every kPerRow-th chunk of its row. Where those are half of the eight that a swizzle mixes, a set
    // high bit of the swizzle exchanges its even and odd chunks: two bases and constants reach them all.
    const int bits = reversed(row), swap = kPerRow == 4 ? bits >> 2 : 0;
    const int to = (q ^ (bits & (kPerRow - 1))) * 16 + swap * kFar;
    to_a_ = row * C::kRowA + to, to_b_ = C::kDepth * C::kRowA + row * C::kRowB + to;
    odd_ = -2 * swap * kFar;
    const int32_t pixel = tile.begin + row;
    left_ = tile.pixels - row;
    const int32_t w = pixel % p.out.w, h = pixel / p.out.w % p.out.h;
    entry_ = pixel / p.out.w / p.out.h;
    const Size2 step{C::kDepth / p.out.w % p.out.h, C::kDepth % p.out.w};
    y_ = h * p.stride.h, x_ = w * p.stride.w;
    step_ = {step.h * p.stride.h, step.w * p.stride.w}, end_ = {p.out.h * p.stride.h, p.out.w * p.stride.w};
    samples_ = C::kDepth / p.out.w / p.out.h;
    const int64_t n = C::kListed ? 0 : entry_;  // a listed sample is looked up

    const int32_t m = tile.m + q * kPer;
    int64_t at = n * p.gs.n + h * p.gs.h + w * p.gs.w + static_cast<int64_t>(tile.group) * p.c_out + m;
    a_ = p.gz.template as<const char>() + at * kSize;
    a_left_ = p.c_out - m;
    in_ = p.c_in, out_ = p.c_out;
    at = n * p.xs.n + static_cast<int64_t>(y_ - p.pad.h) * p.xs.h + static_cast<int64_t>(x_ - p.pad.w) * p.xs.w +
         static_cast<int64_t>(tile.group) * p.c_in;
    b_ = p.x.template as<const char>() + at * kSize;
#pragma unroll
    for (int i = 0; i < kB; ++i) {
      const int32_t column = tile.n + (q + i * kPerRow) * kPer, tap = column / p.tap_columns,
                    c = column - tap * p.tap_columns;
      const bool there = column < p.columns;
      down_[i] = there ? tap / p.kernel.w * p.dilation.h - p.pad.h : kNowhere;
      right_[i] = tap % p.kernel.w * p.dilation.w - p.pad.w;
      of_tap_[i] = (tap / p.kernel.w * p.dilation.h * p.xs.h + (right_[i] + p.pad.w) * p.xs.w + c) * kSize;
      b_left_[i] = p.c_in - c;
    }
    partial_ = p.c_in % kPer != 0 || p.c_out < tile.m + C::kTileM || (C::kListed && p.classes);
    const int64_t ax = p.xs.w * p.stride.w * kSize, ay = p.xs.h * p.stride.h * kSize;
    const int64_t an = C::kListed ? 0 : p.xs.n * kSize, gn = C::kListed ? 0 : p.gs.n;  // go_to() adds a list's
    b_step_ = samples_ * an + step.h * ay + step.w * ax;
    b_row_ = ay - p.out.w * ax, b_sample_ = an - p.out.h * ay;
    a_step_ = (samples_ * gn + step.h * p.gs.h + step.w * p.gs.w) * kSize;
    a_row_ = (p.gs.h - p.out.w * p.gs.w) * kSize, a_sample_ = (gn - p.out.h * p.gs.h) * kSize;
    if (C::kListed && left_ > 0) go_to(entry_);
  }

  // Starts the copies of the current pixels into a stage and goes on to the next ones.
  __device__ __forceinline__ void load(int stage) {
    const bool live = left_ > 0;
    const int32_t y = live ? y_ : kNowhere;
    const Shared<char> a = device::shared_memory() + (stage + to_a_), b = device::shared_memory() + (stage + to_b_);
    const Shared<char> odd_a = a + odd_, odd_b = b + odd_;
    if (!C::kAligned || partial_) {
#pragma unroll
      for (int i = 0; i < kA; ++i)
        part((i % 2 != 0 ? odd_a : a) + i * kFar, a_ + i * kFar, live ? a_left_ - i * kPerRow * kPer : 0);
#pragma unroll
      for (int i = 0; i < kB; ++i)
        part((i % 2 != 0 ? odd_b : b) + i * kFar, b_ + of_tap_[i], inside(i, y) ? b_left_[i] : 0);
    } else {
#pragma unroll
      for (int i = 0; i < kA; ++i) device::copy_async16_if(live, (i % 2 != 0 ? odd_a : a) + i * kFar, a_ + i * kFar);
#pragma unroll
      for (int i = 0; i < kB; ++i)
        device::copy_async16_if(inside(i, y), (i % 2 != 0 ? odd_b : b) + i * kFar, b_ + of_tap_[i]);
    }
    advance();
  }

 private:
  __device__ __forceinline__ bool inside(int i, int32_t y) const {
    return static_cast<uint32_t>(y + down_[i]) < static_cast<uint32_t>(p_.in.h) &&
           static_cast<uint32_t>(x_ + right_[i]) < static_cast<uint32_t>(p_.in.w);
  }

  // The first `left` elements of a chunk: by one copy, or element by element where addresses do not allow that.
  __device__ __forceinline__ void part(Shared<char> to, Global<const char> from, int32_t left) {
    const int32_t count = left < 0 ? 0 : left < kPer ? left : kPer;
    if constexpr (C::kAligned)
      device::copy_async16(to, from, count * kSize);
    else
      device::store(to, device::read_chunk<T>(from.template as<const T>(), count, false));
  }

  __device__ __forceinline__ void advance() {
    left_ -= C::kDepth;
    a_ = a_ + a_step_, b_ = b_ + b_step_;
    x_ += step_.w;
    if (x_ >= end_.w) x_ -= end_.w, y_ += p_.stride.h, a_ = a_ + a_row_, b_ = b_ + b_row_;
    y_ += step_.h;
    int32_t samples = samples_;
    if (y_ >= end_.h) y_ -= end_.h, a_ = a_ + a_sample_, b_ = b_ + b_sample_, ++samples;
    if (C::kListed && samples > 0 && left_ > 0) go_to(entry_ + samples);
  }

  // With lists: to another entry, with its widths.
  __device__ __forceinline__ void go_to(int32_t entry) {
    const int32_t n = device::load<int32_t>(p_.rows + entry), by = n - sample_;
    a_ = a_ + by * p_.gs.n * kSize, b_ = b_ + by * p_.xs.n * kSize;
    entry_ = entry, sample_ = n;
    if (!p_.classes) return;
    const int32_t in = device::entry_of(p_.in_of, n, p_.c_in), out = device::entry_of(p_.out_of, n, p_.c_out);
    a_left_ += out - out_;
#pragma unroll
    for (int i = 0; i < kB; ++i) b_left_[i] += in - in_;
    in_ = in, out_ = out;
  }

  const Wgrad<T>& p_;
  int to_a_, to_b_;               // the thread's first chunk of a stage's A and B
  int32_t odd_;                   // bytes from where odd chunks lie to where the even ones' order has them
  int32_t left_, y_, x_;          // pixels left of the slice; the current one's first tap, without the padding
  Size2 step_, end_;              // in the input's pixels: to the next one, and the output's size
  Global<const char> a_, b_;      // of the current pixel: its first chunk of gz, its first tap of x
  int32_t a_left_, b_left_[kB];   // channels from the thread's chunks on
  int32_t down_[kB], right_[kB];  // of a chunk's tap, less the padding
  int64_t of_tap_[kB];            // bytes from the first tap
  int64_t a_step_, a_row_, a_sample_, b_step_, b_row_, b_sample_;  // to the next pixels, and where a row or map ends
  int32_t samples_, entry_, sample_ = 0;  // in a block of pixels; with a list: the current entry and its sample
  int32_t in_, out_;                      // channels that a_left_ and b_left_ were counted to
  bool partial_;
};

}  // namespace effkern::conv::gpu
