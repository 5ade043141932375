// Brings the operands of the implicit GEMM into shared memory, one K block of one tap a stage: A is a row of channels
// for each output pixel, read through the tap's offset; B a row of channels for each output channel, read from the
// weight as it lies. Both are zero past the active channels, because 0 * NaN is NaN. Rows of 64 bytes are four chunks
// of 16, chunk c of row r lying at c ^ (r / 2 % 4): copies and ldmatrix touch all banks once. A stage holds such a row
// or two of each; a second one without active channels is neither written nor multiplied.
#pragma once

#include "conv_gpu.h"

namespace effkern::conv::gpu {

using device::Shared;
using device::Vec;

constexpr int kRowBytes = 64, kChunkBytes = 16, kChunks = kRowBytes / kChunkBytes;

__device__ __forceinline__ int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row >> 1)) & (kChunks - 1)) * kChunkBytes;
}

// Where a tile lies in the output.
struct Tile {
  Part part;
  int32_t rows;  // of the whole part: count * pixels
  int32_t m, n;  // first row and first output channel
  int32_t group;
};

template <class T>
__device__ __forceinline__ int32_t sample_of(const Global<const int32_t>& rows, int32_t entry) {
  return rows ? device::load<int32_t>(rows + entry) : entry;
}

template <class C>
class Loader {
 public:
  using T = typename C::T;
  static constexpr int64_t kSize = sizeof(T);
  static constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kStep = C::kThreads / kChunks;  // rows between two copies of a thread: a multiple of 8, so that
  static_assert(kStep % 8 == 0);                       // all of them lie in the same swizzled column
  static constexpr int kA = C::kTileM / kStep, kB = C::kTileN / kStep;
  static_assert(kA * kStep == C::kTileM && kB * kStep == C::kTileN);

  __device__ Loader(const Problem<T>& p, const Tile& tile) : p_(p), c_in_(tile.part.c_in) {
    const int row = device::thread() / kChunks, chunk = device::thread() % kChunks;
    first_ = to_ = swizzled(row, chunk);
    channel_ = chunk * kPerChunk;
    // Where c_ makes the block end inside a chunk, which takes copies of a byte count; never, if whole chunks are
    // active.
    partial_after_ = C::kAligned && c_in_ % kPerChunk != 0 ? c_in_ - C::kDepth : INT32_MAX;
    const int32_t pixels = p.out.h * p.out.w;
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      const int32_t m = tile.m + row + i * kStep;
      tap_rows_[i] = tap_columns_[i] = 0;  // rows past the end are zeros
      a_[i] = p.x.template as<const char>();
      if (m >= tile.rows) continue;
      const int32_t pixel = m % pixels, entry = tile.part.first + m / pixels;
      const int32_t y = pixel / p.out.w * p.stride.h - p.pad.h, x = pixel % p.out.w * p.stride.w - p.pad.w;
      for (int k = 0; k < p.kernel.h; ++k)
        tap_rows_[i] |= static_cast<uint32_t>(inside(y + k * p.dilation.h, p.in.h)) << k;
      for (int k = 0; k < p.kernel.w; ++k)
        tap_columns_[i] |= static_cast<uint32_t>(inside(x + k * p.dilation.w, p.in.w)) << k;
      const int64_t n = sample_of<T>(p.x_rows, entry);
      const int64_t at = n * p.xs.n + y * p.xs.h + x * p.xs.w + static_cast<int64_t>(tile.group) * c_in_ + channel_;
      a_[i] = a_[i] + at * kSize;
    }
#pragma unroll
    for (int i = 0; i < kB; ++i) {
      const int64_t n = static_cast<int64_t>(tile.group) * p.group_rows + tile.n + row + i * kStep;
      const int64_t at = n * p.weight_row + channel_;
      b_[i] = p.weight.template as<const char>() + at * kSize;
    }
    // Outputs past the prefix are zeros and not the last one's weights again: that would be one line of L2 that all
    // blocks ask for at once, what a tile half empty then waits for most.
    const int32_t left = tile.part.c_out - tile.n - row;
    rows_b_ = left > 0 ? ceil_div(left, kStep) : 0;
    const int64_t read = ceil_div(c_in_, C::kDepth) * int64_t{C::kHalves * kRowBytes};  // by the end of a tap
    to_next_tap_ = p.dilation.w * p.xs.w * kSize - read;
    to_next_row_ = (p.dilation.h * p.xs.h - (p.kernel.w - 1) * p.dilation.w * p.xs.w) * kSize - read;
    enter_tap();
  }

  // Starts the copies of the current block into the next stage, A first, and goes on to the next block.
  __device__ __forceinline__ void load() {
    const int32_t mine = c_in_ - channel_ - c_;  // active channels from the thread's chunk on
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half)
      if (half == 0 || c_ + half * C::kHalfDepth < c_in_)
        copy(device::shared_memory() + (to_ + half * C::kHalfBytes), half * kRowBytes, mine - half * C::kHalfDepth);
    to_ = to_ + C::kStageBytes < C::kStages * C::kStageBytes ? to_ + C::kStageBytes : first_;
    advance();
  }

 private:
  __device__ static bool inside(int32_t at, int32_t size) { return at >= 0 && at < size; }

  // One row of 64 bytes of each operand, `at` bytes from the block's first channels.
  __device__ __forceinline__ void copy(Shared<char> a, int at, int32_t mine) {
    const Shared<char> b = a + C::kTileM * kRowBytes;
    if constexpr (!C::kAligned) {
      gather(a, b, at, mine < 0 ? 0 : mine);
    } else if (c_ > partial_after_) {
      const int bytes = (mine < 0 ? 0 : mine < kPerChunk ? mine : kPerChunk) * static_cast<int>(kSize);
#pragma unroll
      for (int i = 0; i < kA; ++i)
        device::copy_async16(a + i * kStep * kRowBytes, a_[i] + (a_at_ + at), (live_ & 1u << i) != 0 ? bytes : 0);
#pragma unroll
      for (int i = 0; i < kB; ++i)
        device::copy_async16(b + i * kStep * kRowBytes, b_[i] + (b_at_ + at), i < rows_b_ ? bytes : 0);
    } else {
      const uint32_t live = mine > 0 ? live_ : 0;
      const int32_t rows_b = mine > 0 ? rows_b_ : 0;
#pragma unroll
      for (int i = 0; i < kA; ++i)
        device::copy_async16_if((live & 1u << i) != 0, a + i * kStep * kRowBytes, a_[i] + (a_at_ + at));
#pragma unroll
      for (int i = 0; i < kB; ++i) device::copy_async16_if(i < rows_b, b + i * kStep * kRowBytes, b_[i] + (b_at_ + at));
    }
  }

  __device__ __forceinline__ void enter_tap() {
    live_ = 0;
#pragma unroll
    for (int i = 0; i < kA; ++i) live_ |= (tap_rows_[i] >> tap_.h & tap_columns_[i] >> tap_.w & 1u) << i;
  }

  __device__ __forceinline__ void advance() {
    c_ += C::kDepth;
    a_at_ += C::kHalves * kRowBytes;
    b_at_ += C::kHalves * kRowBytes;
    if (c_ < c_in_) return;
    const bool last = ++tap_.w == p_.kernel.w;
    if (last) tap_.w = 0, ++tap_.h;
    a_at_ += last ? to_next_row_ : to_next_tap_;
    b_at_ += p_.weight_tap * kSize - c_ * kSize;
    c_ = 0;
    enter_tap();
  }

  // Any alignment: element by element through registers. For stems of three channels and odd pitches, not for speed.
  __device__ __forceinline__ void gather(Shared<char> a, Shared<char> b, int at, int elements) {
#pragma unroll
    for (int i = 0; i < kA + kB; ++i) {
      const bool of_a = i < kA;
      const bool there = of_a ? (live_ & 1u << i) != 0 : i - kA < rows_b_;
      const int count = there ? elements : 0;
      const Global<const char> from = of_a ? a_[i < kA ? i : 0] + (a_at_ + at) : b_[i < kA ? 0 : i - kA] + (b_at_ + at);
      Vec<T, kPerChunk> chunk{};
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e)
        if (e < count) chunk.v[e] = device::load<T>(from + e * static_cast<int>(sizeof(T)));
      device::store(of_a ? a + i * kStep * kRowBytes : b + (i - kA) * kStep * kRowBytes, chunk);
    }
  }

  const Problem<T>& p_;
  const int32_t c_in_;
  int32_t first_, to_;  // the thread's place in the first stage and in the next one to fill
  int32_t channel_, partial_after_, c_ = 0;
  Size2 tap_{0, 0};
  Global<const char> a_[kA], b_[kB];
  uint32_t tap_rows_[kA], tap_columns_[kA];  // bit k: the k-th tap row (column) of this output pixel is inside the map
  uint32_t live_;                            // bit i: row i has the current tap
  int32_t rows_b_;                           // the thread's rows of B inside the prefix
  int64_t a_at_ = 0, b_at_ = 0;              // bytes from a row's first tap and channel
  int64_t to_next_tap_, to_next_row_;        // what to add to a_at_ after a tap's last channels
};

}  // namespace effkern::conv::gpu
