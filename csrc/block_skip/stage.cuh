// A whole stage of residual blocks for one sample a thread block: the sample's map stays in shared memory, the weights
// of the blocks it keeps stream past it by asynchronous copies, kStages - 1 stages ahead and across convolutions and
// blocks; a block that it drops costs one bit of its mask. Maps have a border of zeros, so a tap is an offset. The
// first convolution of a block reads one map and writes the other, the second one the other way round, over the
// block's input, which only the thread that owns an output still reads.
//
// Traffic of a sample: x in, y out, the weights of what it keeps from L2.
#pragma once

#include <type_traits>

#include "stage_math.cuh"

namespace effkern::block_skip {

template <Math kMath, class T, int kC>
class StageOfSample {
 public:
  using TensorCore = std::conditional_t<kC == 16, StageColumns<kMath, T>, StageTiles<kMath, T, kC == 16 ? 32 : kC>>;
  using Sums = std::conditional_t<kMath == Math::F32, StageFmas<kC>, TensorCore>;
  static constexpr int kSize = sizeof(T), kPer = 16 / kSize, kChunks = kC / kPer, kPitch = Sums::kPitch;
  static constexpr int kTaps = kC == 16 ? 9 : kC == 32 ? 3 : 1, kStages = kSize == 2 ? 3 : 2, kAhead = kStages - 1;
  static constexpr int kThreads = stage_threads(kC), kParts = 9 / kTaps;  // threads; stages of a convolution
  static constexpr int kStageBytes = kTaps * kC * kPitch;
  // Rows of weights [tap][channels out] that one copy of all threads takes, and those of a thread: one below the other,
  // or so many further that they are of other taps, so that copies' addresses differ by constants.
  static constexpr int kRowsAtOnce = kThreads / kChunks, kRowsTogether = kTaps == 1 ? kC / kRowsAtOnce : 1;
  static constexpr int kNextRow = kTaps == 1 ? 1 : kRowsAtOnce, kCopies = (kTaps * kC + kRowsAtOnce - 1) / kRowsAtOnce;
  static_assert(kNextRow % kC == 0 || kTaps == 1);
  static constexpr int kPair = Sums::kPair;  // channels side by side that a thread has the sums of
  // A turn of a convolution's loop takes a row of taps, or all of them.
  static constexpr int kPartsOfTurn = kTaps == 1 ? 3 : 1;
  // The part at which copies come to the next convolution.
  static constexpr int kLast = (kParts - kAhead % kParts) % kParts;
  // Where each turn begins at the ring's first stage, all of them lie at constants.
  static constexpr bool kWholeRings = kPartsOfTurn == kStages;
  using Pair = Vec<float, kPair>;
  static_assert(kStageBlocks <= 32);

  __device__ explicit StageOfSample(const Stage<T>& p)
      : p_(p), map_{p.h, p.w, kPitch}, low_(p.low), high_(p.high), bytes_((p.h + 2) * (p.w + 1) * kPitch + kPitch) {
    sample_ = device::block();
    middle_ = map_.row() + kPitch;
    const int row = device::thread() / kChunks * kRowsTogether, chunk = device::thread() % kChunks;
    mine_ = (row % kC * 9 + row / kC) * kC + chunk * kPer;
    to_ring_ = 2 * bytes_ + row * kPitch + chunk * 16;
  }

  __device__ void run() {
    clear_border();
    bring_map();
    device::copy_commit();
    const int lane = device::lane();
    uint32_t kept = device::ballot(lane < p_.blocks && keep_of(lane) != 0.0f);  // bit i: block i
    ahead_ = kept;
    weights_ = weights();
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s > 0 && s % kParts == 0) weights_ = next_weights();
      bring_weights(s * kStageBytes);
    }
    Sums sums(map_);
    for (bool second = false; kept != 0; second = !second) {
      const int32_t block = lowest(kept);
      Pair bias[Sums::kN];
#pragma unroll
      for (int j = 0; j < Sums::kN; ++j)
#pragma unroll
        for (int e = 0; e < kPair; ++e)
          bias[j].v[e] = device::load<float>(p_.bias[2 * block + (second ? 1 : 0)] + (sums.channel(j) + e));
      convolve(sums, second);
      if (!second) {
        sums.each([&](int32_t place, int j, Pair sum) {
#pragma unroll
          for (int e = 0; e < kPair; ++e) sum.v[e] = clipped(sum.v[e] + bias[j].v[e]);
          store(at(bytes_, place, sums.channel(j)), sum);
        });
        continue;
      }
      const float gate = p_.soft ? keep_of(block) : 1.0f;
      sums.each([&](int32_t place, int j, Pair sum) {
        const Shared<char> here = at(0, place, sums.channel(j));
        const Pair residual = load(here);
#pragma unroll
        for (int e = 0; e < kPair; ++e) {
          sum.v[e] = clipped(sum.v[e] + bias[j].v[e] + residual.v[e]);
          // Exactly the new value at 1: the old one may be infinite.
          if (gate != 1.0f) sum.v[e] = device::fma(gate, sum.v[e], (1.0f - gate) * residual.v[e]);
        }
        store(here, sum);
      });
      kept &= kept - 1;
    }
    device::copy_wait<0>();
    device::sync();
    write_map();
  }

 private:
  __device__ static __forceinline__ int32_t lowest(uint32_t bits) { return device::popcount(~bits & (bits - 1)); }
  __device__ __forceinline__ float keep_of(int32_t block) const {
    return device::load<float>(p_.keep + (sample_ * p_.keep_row + block));
  }
  // NaN passes, as in torch.
  __device__ __forceinline__ float clipped(float v) const {
    v = v < low_ ? low_ : v;
    return v > high_ ? high_ : v;
  }

  // A pixel's channel in a map that begins at `map`.
  __device__ __forceinline__ Shared<char> at(int32_t map, int32_t place, int32_t channel) const {
    return device::shared_memory() + (map + place + middle_ + channel * kSize);
  }
  // Halves by the word: the compiler takes a struct of them apart into bytes.
  __device__ __forceinline__ static Pair load(Shared<char> from) {
    if constexpr (kSize == 4) {
      return device::load<Pair>(from);
    } else {
      const auto both = device::load<uint32_t>(from);
      const T low{static_cast<uint16_t>(both)}, high{static_cast<uint16_t>(both >> 16)};
      return {{device::to_float(low), device::to_float(high)}};
    }
  }
  __device__ __forceinline__ static void store(Shared<char> to, const Pair& values) {
    Vec<T, kPair> narrow;
#pragma unroll
    for (int e = 0; e < kPair; ++e) narrow.v[e] = device::from_float<T>(values.v[e]);
    device::store(to, narrow);
  }

  // Zeros around both maps; what lies inside is written before it is read.
  __device__ void clear_border() const {
    const int32_t row = p_.w + 1, pixels = (p_.h + 2) * row + 1;
    for (int32_t i = device::thread(); i < 2 * pixels * kChunks; i += kThreads) {
      const int32_t pixel = i / kChunks % pixels, map = i / kChunks / pixels * bytes_;
      if (pixel >= row && pixel < pixels - row && pixel % row != 0) continue;
      device::store(device::shared_memory() + (map + pixel * kPitch + i % kChunks * 16), Vec<uint32_t, 4>{});
    }
  }

  __device__ void bring_map() const {
    for (int32_t i = device::thread(); i < map_.pixels() * kChunks; i += kThreads) {
      const int32_t pixel = i / kChunks, channel = i % kChunks * kPer;
      const Global<const T> from =
          p_.x + (sample_ * p_.xs.n + pixel / p_.w * p_.xs.h + pixel % p_.w * p_.xs.w + channel);
      const Shared<char> to = at(0, map_.place(pixel), channel);
      if (p_.wide_x) {
        device::copy_async16(to, from, 16);
      } else {
        Vec<T, kPer> chunk;
#pragma unroll
        for (int e = 0; e < kPer; ++e) chunk.v[e] = device::load<T>(from + e);
        device::store(to, chunk);
      }
    }
  }

  __device__ void write_map() const {
    for (int32_t i = device::thread(); i < map_.pixels() * kChunks; i += kThreads) {
      const int32_t pixel = i / kChunks, channel = i % kChunks * kPer;
      const Global<T> to = p_.y + (sample_ * p_.ys.n + pixel / p_.w * p_.ys.h + pixel % p_.w * p_.ys.w + channel);
      const auto chunk = device::load<Vec<T, kPer>>(at(0, map_.place(pixel), channel));
      if (p_.wide_y) {
        device::store(to, chunk);
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e) device::store(to + e, chunk.v[e]);
      }
    }
  }

  // The thread's first chunk of a weight.
  struct Weights {
    Global<const T> at;
    bool there;  // false past the last convolution
  };
  // Of the convolution whose copies follow those under way.
  __device__ __forceinline__ Weights next_weights() {
    if (ahead_second_) ahead_ &= ahead_ - 1;
    ahead_second_ = !ahead_second_;
    return weights();
  }
  __device__ __forceinline__ Weights weights() const {
    const int32_t block = ahead_ != 0 ? lowest(ahead_) : 0;
    return {p_.weight[2 * block + (ahead_second_ ? 1 : 0)] + mine_, ahead_ != 0};
  }

  // Starts the copies of the next part of the weights into a stage; one group of copies, which is empty behind the last
  // one.
  __device__ __forceinline__ void bring_weights(int to) {
    const Shared<char> ring = device::shared_memory() + (to_ring_ + to);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = i * kNextRow;
      const bool mine = (i + 1) * kRowsAtOnce <= kTaps * kC || device::thread() < (kTaps * kC - row) * kChunks;
      device::copy_async16_where(mine && weights_.there, ring + row * kPitch,
                                 weights_.at + (row % kC * 9 + row / kC) * kC);
    }
    weights_.at = weights_.at + kTaps * kC;
    device::copy_commit();
  }

  // One convolution of a map; the barriers of its stages part it from what the other one wrote.
  __device__ __forceinline__ void convolve(Sums& sums, bool second) {
    sums.clear();
    const Weights next = next_weights();
    Shared<char> map = device::shared_memory() + (second ? bytes_ : 0);
#pragma unroll 1
    for (int turn = 0; turn < kParts / kPartsOfTurn; ++turn) {
#pragma unroll
      for (int part = 0; part < kPartsOfTurn; ++part) {
        if constexpr (kWholeRings) from_ = part * kStageBytes, to_ = (part + kAhead) % kStages * kStageBytes;
        device::copy_wait<kStages - 2>();
        device::sync();  // the stage is there for all, and all are done with the one before it, which is filled next
        if (turn == kLast / kPartsOfTurn && part == kLast % kPartsOfTurn) weights_ = next;
        bring_weights(to_);
        sums.template multiply<kTaps>(map + part * kPitch, device::shared_memory() + (2 * bytes_ + from_));
        to_ = from_;
        from_ = from_ + kStageBytes < kStages * kStageBytes ? from_ + kStageBytes : 0;
      }
      map = map + map_.row();
    }
  }

  const Stage<T>& p_;
  const StageMap map_;
  const float low_, high_;
  const int32_t bytes_;  // of a map
  int64_t sample_;
  int32_t middle_;                                // from a pixel's first tap to itself
  uint32_t ahead_;                                // blocks whose weights no copy has been started of,
  bool ahead_second_ = false;                     // less the first convolution of the first of them
  Weights weights_;                               // at the next part to bring
  int32_t mine_, to_ring_;                        // the thread's first chunk of a part, in a weight and in the ring
  int32_t from_ = 0, to_ = kAhead * kStageBytes;  // stages of the ring to multiply and to fill, in bytes
};

template <Math kMath, class T, int kC>
__global__ void __launch_bounds__(stage_threads(kC), 1) stage(const __grid_constant__ Stage<T> p) {
  StageOfSample<kMath, T, kC> sample(p);
  sample.run();
}

}  // namespace effkern::block_skip
