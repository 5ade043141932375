// A coded matrix times few rows on tensor cores: entries are the 16-row operand as they lie in the book, in as many
// copies as keep lanes that look up different entries on different banks; x is the operand of eight columns, straight
// from memory, or several of them for every entry that was looked up. The order of the sum is free, so a lane's 8 or 16
// bytes of an entry, and the same bytes of x, are its share of two or four products' depth: nothing is moved between
// lanes. The warps of a block share the positions, segments of 16 bytes of codes in turn; their sums, each of two by
// turns, meet in shared memory and are added in order: the same in every launch, and for every number of rows.
//
// Traffic: the codes once for kEights times eight rows, book and x once a block, from L2.
#pragma once

#include "../conv/conv_epilogue.cuh"
#include "dots_mma_gpu.h"

namespace effkern::pq {

using device::Shared;

// kPer: numbers of a chunk. kTiles: of 16 outputs. kEights: of rows.
template <class T, int kPer, int kTiles, int kEights>
class MmaDots {
 public:
  using Chunk = device::Vec<uint32_t, kPer / 2>;
  using Words = device::Vec<uint32_t, 4>;
  static constexpr int kBytes = sizeof(Chunk), kMmas = kPer / 4, kOutputs = 16 * kTiles, kPitch = mma_pitch(kTiles);
  static constexpr int kRows = kDotsRows * kEights;

  __device__ explicit MmaDots(const Dots<T>& p) : p_(p) {
    chunks_ = p.d / kPer, a_copy_ = p.copies * kBytes;
    warp_ = device::thread() / 32, group_ = device::lane() / 4, part_ = device::lane() % 4;
    segments_ = (p.positions + mma_segment(p) - 1) / mma_segment(p);
    sums_at_ = mma_book_bytes(p);
  }

  // A block of outputs for the rows of a tile. kSteps: of four positions in a segment. `first`: the book is not there.
  template <int kSteps>
  __device__ __forceinline__ void item(int32_t group, int32_t tile, bool first) {
    first_row_ = tile * kRows, first_output_ = group * kOutputs;
    Words codes[kTiles][2], next_codes[kTiles][2];
    Chunk x[kSteps][kEights], next_x[kSteps][kEights];
    float sums[kTiles][kEights][2][4] = {};
    bring_codes<kSteps>(warp_, codes);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) bring_x<kSteps>(warp_, step, 0, x[step]);
    if (first) bring_book();
    device::sync();  // the book is there, the sums of the item before are read
    for (int32_t segment = warp_; segment < segments_; segment += kMmaWarps) {
      bring_codes<kSteps>(segment + kMmaWarps, next_codes);
      for (int32_t c = 0; c < chunks_; ++c) {
        const bool last = c + 1 == chunks_;
        const int32_t next_segment = last ? segment + kMmaWarps : segment, next_chunk = last ? 0 : c + 1;
        // All that comes next at once, or, where registers would not suffice, into the place of what was used.
        if constexpr (kEights == 1) {
#pragma unroll
          for (int step = 0; step < kSteps; ++step) bring_x<kSteps>(next_segment, step, next_chunk, next_x[step]);
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
            multiply(entry_of<kSteps>(codes[i][0], segment, step, c), entry_of<kSteps>(codes[i][1], segment, step, c),
                     x[step], step, sums[i]);
          if constexpr (kEights == 1)
            x[step][0] = next_x[step][0];
          else
            bring_x<kSteps>(next_segment, step, next_chunk, x[step]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) codes[i][0] = next_codes[i][0], codes[i][1] = next_codes[i][1];
    }
    keep(sums);
    device::sync();
    write();
  }

 private:
  template <int kSteps>
  __device__ __forceinline__ int32_t position_of(int32_t segment, int step) const {
    return segment * (kSteps * 4) + step * 4 + part_;
  }

  // Of outputs group_ and group_ + 8 of each tile; 16 bytes that the four lanes share, of which each uses its own.
  template <int kSteps>
  __device__ __forceinline__ void bring_codes(int32_t segment, Words (&to)[kTiles][2]) const {
    constexpr int kCodeBytes = 4 / kSteps;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Outputs past the last one read its codes again, and are not stored.
        const int32_t output = first_output_ + i * 16 + half * 8 + group_;
        const int64_t row = static_cast<int64_t>(output < p_.outputs ? output : p_.outputs - 1) * p_.positions;
        to[i][half] = Words{};
        if (p_.wide_codes) {
          if (segment < segments_)
            to[i][half] = device::load<Words>(p_.codes.p + (row + segment * (kSteps * 4)) * kCodeBytes);
          continue;
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int32_t position = position_of<kSteps>(segment, step);
          if (position >= p_.positions) continue;
          if constexpr (kCodeBytes == 1) {
            to[i][half].v[step] = device::load<uint8_t>(p_.codes.p.template as<const uint8_t>() + (row + position));
            to[i][half].v[step] <<= 8 * part_;
          } else {
            const uint32_t code = device::load<uint16_t>(p_.codes.p.template as<const uint16_t>() + (row + position));
            to[i][half].v[2 * step] = to[i][half].v[2 * step + 1] = code << 16 * (part_ % 2);
          }
        }
      }
  }

  // Zeros for rows and positions past the last.
  template <int kSteps>
  __device__ __forceinline__ void bring_x(int32_t segment, int step, int32_t c, Chunk (&to)[kEights]) const {
    const int32_t position = position_of<kSteps>(segment, step);
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
      const int32_t row = first_row_ + eight * kDotsRows + group_;
      to[eight] = Chunk{};
      if (row >= p_.rows || position >= p_.positions) continue;
      const Global<const T> from = p_.x + (row * p_.x_row + (position * p_.d + c * kPer));
      if (p_.wide_x) {
        to[eight] = device::load<Chunk>(from);
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e)
          to[eight].v[e / 2] |= static_cast<uint32_t>(device::load<T>(from + e).bits) << 16 * (e % 2);
      }
    }
  }

  // Chunks of lanes that store together begin with different copies, on different banks.
  __device__ void bring_book() const {
    const int32_t turn = device::lane() * a_copy_ / 128;
    for (int32_t i = device::thread(); i < p_.codes.entries * chunks_; i += kMmaThreads) {
      const auto chunk = device::load<Chunk>(p_.book + i * kPer);
      for (int32_t copy = 0; copy < p_.copies; ++copy)
        device::store(at_chunk(i, (copy + turn) & (p_.copies - 1)), chunk);
    }
    for (int32_t i = device::thread(); i < chunks_ * p_.copies; i += kMmaThreads)
      device::store(at_chunk(p_.codes.entries * chunks_, i), Chunk{});
  }
  __device__ __forceinline__ Shared<char> at_chunk(int32_t chunk, int32_t copy) const {
    return device::shared_memory() + (chunk * a_copy_ + copy * kBytes);
  }

  // Where the lane's chunk of its entry lies. A code is held to the entries there are; past the last position, where x
  // is zeros, it stands for the entry of zeros: others may hold infinities.
  template <int kSteps>
  __device__ __forceinline__ Shared<char> entry_of(const Words& codes, int32_t segment, int step, int32_t c) const {
    uint32_t code;
    if constexpr (kSteps == 4)
      code = codes.v[step] >> (8 * part_) & 0xffu;
    else
      code = (part_ < 2 ? codes.v[2 * step] : codes.v[2 * step + 1]) >> (16 * (part_ % 2)) & 0xffffu;
    int32_t entry = kSteps == 2 && p_.codes.has_sign && code >= 0x8000u ? 0 : static_cast<int32_t>(code);
    entry = entry < p_.codes.entries ? entry : p_.codes.entries - 1;
    if (position_of<kSteps>(segment, step) >= p_.positions) entry = p_.codes.entries;
    return at_chunk(entry * chunks_ + c, device::lane() & (p_.copies - 1));
  }

  __device__ __forceinline__ void multiply(Shared<char> low, Shared<char> high, const Chunk (&x)[kEights], int step,
                                           float (&sums)[kEights][2][4]) const {
    const auto above = device::load<Chunk>(low), below = device::load<Chunk>(high);
#pragma unroll
    for (int i = 0; i < kMmas; ++i) {
      const uint32_t a[4] = {above.v[2 * i], below.v[2 * i], above.v[2 * i + 1], below.v[2 * i + 1]};
#pragma unroll
      for (int eight = 0; eight < kEights; ++eight) {
        const uint32_t b[2] = {x[eight].v[2 * i], x[eight].v[2 * i + 1]};
        float (&sum)[4] = sums[eight][(step * kMmas + i) % 2];
        if constexpr (std::is_same_v<T, device::F16>)
          device::mma_f16(sum, a, b);
        else
          device::mma_bf16(sum, a, b);
      }
    }
  }

  __device__ __forceinline__ Shared<char> sum_at(int32_t warp, int32_t row, int32_t output) const {
    return device::shared_memory() + (sums_at_ + ((warp * kRows + row) * kPitch + output) * 4);
  }
  __device__ __forceinline__ void keep(const float (&sums)[kTiles][kEights][2][4]) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int eight = 0; eight < kEights; ++eight)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          device::store(sum_at(warp_, eight * kDotsRows + part_ * 2 + r % 2, i * 16 + r / 2 * 8 + group_),
                        sums[i][eight][0][r] + sums[i][eight][1][r]);
  }
  __device__ __forceinline__ void write() const {
    for (int32_t i = device::thread(); i < kRows * kOutputs; i += kMmaThreads) {
      const int32_t row = i / kOutputs, place = i % kOutputs, output = first_output_ + place;
      if (first_row_ + row >= p_.rows || output >= p_.outputs) continue;
      const float scale = p_.scale ? device::load<float>(p_.scale + output) : 1.0f;
      const float bias = p_.bias ? device::load<float>(p_.bias + output) : 0.0f;
      float sum = device::load<float>(sum_at(0, row, place));
#pragma unroll
      for (int warp = 1; warp < kMmaWarps; ++warp) sum += device::load<float>(sum_at(warp, row, place));
      const float v = conv::gpu::activate(device::fma(sum, scale, bias), p_.act);
      device::store(p_.y + (static_cast<int64_t>(first_row_ + row) * p_.outputs + output), device::from_float<T>(v));
    }
  }

  const Dots<T>& p_;
  int32_t chunks_, a_copy_, warp_, group_, part_, segments_, sums_at_;
  int32_t first_row_ = 0, first_output_ = 0;
};

template <class T, int kPer, int kTiles, int kEights>
__global__ void __launch_bounds__(kMmaThreads, mma_blocks(kTiles, kEights))
    dots_mma(const __grid_constant__ Dots<T> p, int32_t groups, int32_t items) {
  MmaDots<T, kPer, kTiles, kEights> block(p);
  const int32_t first = static_cast<int32_t>(device::block());
  for (int32_t id = first; id < items; id += static_cast<int32_t>(device::blocks())) {
    if (p.codes.bytes == 1)
      block.template item<4>(id % groups, id / groups, id == first);
    else
      block.template item<2>(id % groups, id / groups, id == first);
  }
}

}  // namespace effkern::pq
