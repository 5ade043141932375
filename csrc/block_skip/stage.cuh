// A whole stage of residual blocks for one sample a thread block: the sample's map stays in shared memory, the weights
// of the blocks it keeps stream past it by asynchronous copies, kStages - 1 stages ahead and across convolutions and
// blocks; a block that it drops costs one look at the mask. Maps have a border of zeros, so a tap is an offset. Both
// convolutions hold all sums of the map in registers, so the second one writes over the block's input, which only the
// thread that owns an output still reads.
//
// Traffic of a sample: x in, y out, the weights of what it keeps from L2.
#pragma once

#include <type_traits>

#include "stage_math.cuh"

namespace effkern::block_skip {

template <Math kMath, class T, int kC>
class StageOfSample {
 public:
  using Sums = std::conditional_t<kMath == Math::F32, StageFmas<kC>, StageTensorCore<kMath, T, kC>>;
  static constexpr int kSize = sizeof(T), kPer = 16 / kSize, kChunks = kC / kPer, kPitch = Sums::kPitch;
  static constexpr int kTaps = kC == 16 ? 9 : kC == 32 ? 3 : 1, kStages = kSize == 2 ? 3 : 2;
  static constexpr int kParts = 9 / kTaps;  // stages of a convolution
  static constexpr int kStageBytes = kTaps * kC * kPitch;

  __device__ explicit StageOfSample(const Stage<T>& p)
      : p_(p), map_{p.w, p.h * p.w, kPitch}, bytes_((p.h + 2) * (p.w + 1) * kPitch + kPitch) {
    sample_ = device::block();
    middle_ = (p.w + 2) * kPitch;
  }

  __device__ void run() {
    clear_border();
    bring_map();
    device::copy_commit();
    ahead_ = next_kept(0);
    int32_t block = ahead_;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) bring_weights();
    Sums sums(map_);
    for (; block < p_.blocks; block = next_kept(block + 1)) {
      convolve(sums);
      const int32_t second = 2 * block + 1;
      sums.each([&](int32_t place, int32_t channel, const auto& sum) {
        store(bytes_, place, channel, activated(sum, 2 * block, channel));
      });
      convolve(sums);
      const float gate = gate_of(block);
      sums.each([&](int32_t place, int32_t channel, auto sum) {
        using Pair = Vec<T, Sums::kPair>;
        const auto old = device::load<Pair>(at(0, place, channel));
        sum = with_bias(sum, second, channel);
#pragma unroll
        for (int e = 0; e < Sums::kPair; ++e) {
          const float residual = device::to_float(old.v[e]);
          sum.v[e] = clipped(sum.v[e] + residual);
          // Exactly the new value at 1: the old one may be infinite.
          if (gate != 1.0f) sum.v[e] = device::fma(gate, sum.v[e], (1.0f - gate) * residual);
        }
        store(0, place, channel, sum);
      });
    }
    device::copy_wait<0>();
    device::sync();
    write_map();
  }

 private:
  __device__ __forceinline__ float gate_of(int32_t block) const {
    const float keep = device::load<float>(p_.keep + (sample_ * p_.keep_row + block));
    return p_.soft || keep == 0.0f ? keep : 1.0f;
  }
  // NaN passes, as in torch.
  __device__ __forceinline__ float clipped(float v) const { return v < p_.low ? p_.low : v > p_.high ? p_.high : v; }
  // The first block from this one on that the sample keeps.
  __device__ int32_t next_kept(int32_t block) const {
    while (block < p_.blocks && gate_of(block) == 0.0f) ++block;
    return block;
  }

  // A pixel's channel in a map that begins at `map`.
  __device__ __forceinline__ Shared<char> at(int32_t map, int32_t place, int32_t channel) const {
    return device::shared_memory() + (map + place + middle_ + channel * kSize);
  }
  __device__ __forceinline__ void store(int32_t map, int32_t place, int32_t channel,
                                        const Vec<float, Sums::kPair>& values) const {
    Vec<T, Sums::kPair> narrow;
#pragma unroll
    for (int e = 0; e < Sums::kPair; ++e) narrow.v[e] = device::from_float<T>(values.v[e]);
    device::store(at(map, place, channel), narrow);
  }
  __device__ __forceinline__ Vec<float, Sums::kPair> with_bias(Vec<float, Sums::kPair> sum, int32_t conv,
                                                               int32_t channel) const {
#pragma unroll
    for (int e = 0; e < Sums::kPair; ++e) sum.v[e] += device::load<float>(p_.bias[conv] + (channel + e));
    return sum;
  }
  __device__ __forceinline__ Vec<float, Sums::kPair> activated(Vec<float, Sums::kPair> sum, int32_t conv,
                                                               int32_t channel) const {
    sum = with_bias(sum, conv, channel);
#pragma unroll
    for (int e = 0; e < Sums::kPair; ++e) sum.v[e] = clipped(sum.v[e]);
    return sum;
  }

  // Zeros around both maps; what lies inside is written before it is read.
  __device__ void clear_border() const {
    const int32_t row = p_.w + 1, pixels = (p_.h + 2) * row + 1;
    for (int32_t i = device::thread(); i < 2 * pixels * kChunks; i += kStageThreads) {
      const int32_t pixel = i / kChunks % pixels, map = i / kChunks / pixels * bytes_;
      if (pixel >= row && pixel < pixels - row && pixel % row != 0) continue;
      device::store(device::shared_memory() + (map + pixel * kPitch + i % kChunks * 16), Vec<uint32_t, 4>{});
    }
  }

  __device__ void bring_map() const {
    for (int32_t i = device::thread(); i < map_.pixels * kChunks; i += kStageThreads) {
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
    for (int32_t i = device::thread(); i < map_.pixels * kChunks; i += kStageThreads) {
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

  // Starts the copies of the next stage of weights, of whatever convolution it is; one group of copies, which is empty
  // behind the last one.
  __device__ __forceinline__ void bring_weights() {
    if (ahead_ < p_.blocks) {
      const Global<const T> weight = p_.weight[2 * ahead_ + part_ / kParts] + part_ % kParts * kTaps * kC;
      const Shared<char> ring = device::shared_memory() + (2 * bytes_ + to_);
      for (int32_t i = device::thread(); i < kTaps * kC * kChunks; i += kStageThreads) {
        const int32_t chunk = i % kChunks, row = i / kChunks % kC, tap = i / (kChunks * kC);
        device::copy_async16(ring + ((tap * kC + row) * kPitch + chunk * 16),
                             weight + ((row * 9 + tap) * kC + chunk * kPer), 16);
      }
      to_ = to_ + kStageBytes < kStages * kStageBytes ? to_ + kStageBytes : 0;
      if (++part_ == 2 * kParts) part_ = 0, ahead_ = next_kept(ahead_ + 1);
    }
    device::copy_commit();
  }

  // One convolution of the map that is in turn; the barriers of its stages part it from what the other one wrote.
  __device__ __forceinline__ void convolve(Sums& sums) {
    sums.clear();
    const Shared<char> map = device::shared_memory() + (second_ ? bytes_ : 0);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      device::copy_wait<kStages - 2>();
      device::sync();  // the stage is there for all, and all are done with the one before it, which is filled next
      bring_weights();
#pragma unroll 1
      for (int t = 0; t < kTaps; ++t) {
        const int tap = part * kTaps + t;
        sums.multiply(map + (tap / 3 * (p_.w + 1) + tap % 3) * kPitch,
                      device::shared_memory() + (2 * bytes_ + from_ + t * kC * kPitch));
      }
      from_ = from_ + kStageBytes < kStages * kStageBytes ? from_ + kStageBytes : 0;
    }
    second_ = !second_;
  }

  const Stage<T>& p_;
  const StageMap map_;
  const int32_t bytes_;  // of a map
  int64_t sample_;
  int32_t middle_;                // from a pixel's first tap to itself
  int32_t ahead_ = 0, part_ = 0;  // the next weights to bring: block, stage of its convolutions
  int32_t to_ = 0, from_ = 0;     // stages of the ring to fill and to multiply, in bytes
  bool second_ = false;
};

template <Math kMath, class T, int kC>
__global__ void __launch_bounds__(kStageThreads, 1) stage(const __grid_constant__ Stage<T> p) {
  StageOfSample<kMath, T, kC> sample(p);
  sample.run();
}

}  // namespace effkern::block_skip
