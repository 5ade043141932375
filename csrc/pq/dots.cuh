// A coded matrix times few rows: codes are streamed 16 bytes a lane and never decoded into a weight. A team of lanes
// makes two outputs of up to eight rows: each lane takes 16 bytes of codes of either output, then the next lane's, so
// that a segment is what the team reads at once. The book lies in shared memory, in as many copies as keep lanes that
// look up different entries on different banks; so do the segment's numbers of x. Sums are fp32, over a lane's codes
// in order, over segments, then over lanes as a tree: the same in every launch, whatever the number of rows.
//
// Traffic: the codes once for eight rows, the book and x once a block, from L2.
#pragma once

#include "../conv/conv_epilogue.cuh"
#include "dots_gpu.h"

namespace effkern::pq {

using device::Shared;

// kPer: numbers of a chunk. kM: rows of x at most.
template <class T, int kPer, int kM>
class DotsOfBlock {
 public:
  using Chunk = device::Vec<T, kPer>;
  using Words = device::Vec<uint32_t, 4>;
  static constexpr int kBytes = sizeof(Chunk);

  __device__ explicit DotsOfBlock(const Dots<T>& p) : p_(p) {
    chunks_ = p.d / kPer, a_lane_ = kCodesBytes / p.codes.bytes;
    pitch_ = a_lane_ * chunks_ + 1;
    x_at_ = p.codes.entries * chunks_ * p.copies * kBytes;
    lane_ = device::thread() % p.lanes, team_ = device::thread() / p.lanes;
    segments_ = (p.positions + p.lanes * a_lane_ - 1) / (p.lanes * a_lane_);
    copy_ = device::lane() % p.copies;
  }

  __device__ void bring_book() {
    for (int32_t i = device::thread(); i < p_.codes.entries * chunks_ * p_.copies; i += kDotsThreads)
      device::store(device::shared_memory() + i * kBytes,
                    device::load<Chunk>(p_.book + static_cast<int64_t>(i / p_.copies) * kPer));
  }

  // Two outputs of each team for the rows of a tile. `there`: their x is in shared memory.
  __device__ void item(int32_t group, int32_t tile, bool there) {
    first_ = tile * kDotsRows, rows_ = p_.rows - first_ < kM ? p_.rows - first_ : kM;
    output_ = (group * (kDotsThreads / p_.lanes) + team_) * kDotsOutputs;
    float sums[kDotsOutputs][kM] = {};
    Words codes[kDotsOutputs], next[kDotsOutputs] = {};
    bring_codes(0, codes);
    for (int32_t segment = 0; segment < segments_; ++segment) {
      if (segments_ > 1 || !there) {
        device::sync();  // all are done with the segment before
        bring_x(segment);
        device::sync();
      }
      if (segment + 1 < segments_) bring_codes(segment + 1, next);
      multiply(segment, codes, sums);
#pragma unroll
      for (int o = 0; o < kDotsOutputs; ++o) codes[o] = next[o];
    }
    write(sums);
  }

 private:
  __device__ __forceinline__ int32_t position_of(int32_t segment) const {
    return (segment * p_.lanes + lane_) * a_lane_;
  }

  __device__ __forceinline__ void bring_codes(int32_t segment, Words (&to)[kDotsOutputs]) const {
    const int32_t position = position_of(segment), left = p_.positions - position;
#pragma unroll
    for (int o = 0; o < kDotsOutputs; ++o) {
      // Outputs past the last one read its codes again, and are not stored.
      const int64_t output = output_ + o < p_.outputs ? output_ + o : p_.outputs - 1;
      const int64_t at = output * p_.positions + position;
      to[o] = Words{};
      if (p_.wide_codes) {
        if (left > 0) to[o] = device::load<Words>(p_.codes.p + at * p_.codes.bytes);
      } else {
#pragma unroll
        for (int word = 0; word < 4; ++word)
          for (int32_t i = 0; i < a_lane_ / 4; ++i) {
            if (word * (a_lane_ / 4) + i >= left) break;
            const int64_t code = at + word * (a_lane_ / 4) + i;
            const uint32_t value = p_.codes.bytes == 1
                                       ? device::load<uint8_t>(p_.codes.p.template as<const uint8_t>() + code)
                                       : device::load<uint16_t>(p_.codes.p.template as<const uint16_t>() + code);
            to[o].v[word] |= value << (8 * p_.codes.bytes * i);
          }
      }
    }
  }

  __device__ void bring_x(int32_t segment) {
    const int32_t per_lane = a_lane_ * chunks_, first = segment * p_.lanes * per_lane;
    const int32_t left = p_.positions * chunks_ - first,
                  chunks = left < p_.lanes * per_lane ? left : p_.lanes * per_lane;
    for (int32_t m = 0; m < rows_; ++m) {
      const Global<const T> from = p_.x + ((first_ + m) * p_.x_row + static_cast<int64_t>(first) * kPer);
      for (int32_t i = device::thread(); i < chunks; i += kDotsThreads) {
        Chunk chunk;
        if (p_.wide_x) {
          chunk = device::load<Chunk>(from + i * kPer);
        } else {
#pragma unroll
          for (int e = 0; e < kPer; ++e) chunk.v[e] = device::load<T>(from + (i * kPer + e));
        }
        device::store(x_of(m, i / per_lane) + i % per_lane * kBytes, chunk);
      }
    }
  }

  __device__ __forceinline__ Shared<char> x_of(int32_t row, int32_t lane) const {
    return device::shared_memory() + (x_at_ + (row * p_.lanes + lane) * pitch_ * kBytes);
  }

  __device__ __forceinline__ void multiply(int32_t segment, Words (&codes)[kDotsOutputs],
                                           float (&sums)[kDotsOutputs][kM]) {
    const int32_t left = p_.positions - position_of(segment), bits = 8 * p_.codes.bytes;
    const uint32_t mask = (1u << bits) - 1u;
    Shared<char> x = x_of(0, lane_);
#pragma unroll
    for (int word = 0; word < 4; ++word)
      for (int32_t i = 0; i < a_lane_ / 4; ++i) {
        if (word * (a_lane_ / 4) + i >= left) return;
        int32_t entry[kDotsOutputs];
#pragma unroll
        for (int o = 0; o < kDotsOutputs; ++o) {
          entry[o] = held(codes[o].v[word] & mask);
          codes[o].v[word] >>= bits;
        }
        for (int32_t c = 0; c < chunks_; ++c, x = x + kBytes) {
          float numbers[kDotsOutputs][kPer];
#pragma unroll
          for (int o = 0; o < kDotsOutputs; ++o) {
            const auto chunk =
                device::load<Chunk>(device::shared_memory() + ((entry[o] * chunks_ + c) * p_.copies + copy_) * kBytes);
#pragma unroll
            for (int e = 0; e < kPer; ++e) numbers[o][e] = device::to_float(chunk.v[e]);
          }
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            if (m >= rows_) break;
            const auto chunk = device::load<Chunk>(x + m * p_.lanes * pitch_ * kBytes);
#pragma unroll
            for (int o = 0; o < kDotsOutputs; ++o)
#pragma unroll
              for (int e = 0; e < kPer; ++e)
                sums[o][m] = device::fma(device::to_float(chunk.v[e]), numbers[o][e], sums[o][m]);
          }
        }
      }
  }

  // A code held to the entries there are.
  __device__ __forceinline__ int32_t held(uint32_t code) const {
    const int32_t value = p_.codes.has_sign && code >= 0x8000u ? 0 : static_cast<int32_t>(code);
    return value < p_.codes.entries ? value : p_.codes.entries - 1;
  }

  __device__ __forceinline__ void write(float (&sums)[kDotsOutputs][kM]) const {
#pragma unroll
    for (int o = 0; o < kDotsOutputs; ++o) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (m >= rows_) break;
        for (int32_t bits = p_.lanes / 2; bits > 0; bits /= 2) sums[o][m] += device::shuffle_xor(sums[o][m], bits);
      }
      const int32_t output = output_ + o;
      if (lane_ != 0 || output >= p_.outputs) continue;
      const float scale = p_.scale ? device::load<float>(p_.scale + output) : 1.0f;
      const float bias = p_.bias ? device::load<float>(p_.bias + output) : 0.0f;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (m >= rows_) break;
        const float v = conv::gpu::activate(device::fma(sums[o][m], scale, bias), p_.act);
        device::store(p_.y + (static_cast<int64_t>(first_ + m) * p_.outputs + output), device::from_float<T>(v));
      }
    }
  }

  const Dots<T>& p_;
  int32_t chunks_, a_lane_, pitch_, x_at_, lane_, team_, segments_, copy_;
  int32_t first_ = 0, rows_ = 0, output_ = 0;
};

template <class T, int kPer, int kM>
__global__ void __launch_bounds__(kDotsThreads, 3)
    dots(const __grid_constant__ Dots<T> p, int32_t groups, int32_t items) {
  DotsOfBlock<T, kPer, kM> block(p);
  block.bring_book();  // the first item's barriers show it
  int32_t before = -1;
  for (int32_t id = static_cast<int32_t>(device::block()); id < items; id += static_cast<int32_t>(device::blocks())) {
    block.item(id % groups, id / groups, id / groups == before);
    before = id / groups;
  }
}

}  // namespace effkern::pq
