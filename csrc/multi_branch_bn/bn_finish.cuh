// How the kernels between two passes over the maps add up the slices' sums: a block takes eight channels, a sector of
// memory, and 128 threads each of their terms (branches; the gradient's sums): sixteen for a channel, which take every
// sixteenth slice and are added in order. What is summed in what order follows from the number of slices alone.
#pragma once

#include "bn_gpu.h"

namespace effkern::multi_branch_bn::gpu {

using device::Shared;

constexpr int kFinishChannels = 8, kFinishLanes = 16, kTermThreads = kFinishChannels * kFinishLanes;
constexpr int kMostFinishThreads = (1 + kBranches) * kTermThreads;
constexpr int kFinishShared = (2 * kMostFinishThreads + kBranches * kFinishChannels) * 8;

__device__ __forceinline__ Shared<double> first_sums() { return device::shared_memory().as<double>(); }
__device__ __forceinline__ Shared<double> second_sums() { return first_sums() + kMostFinishThreads; }
__device__ __forceinline__ Shared<double> of_terms() { return second_sums() + kMostFinishThreads; }

struct FinishPlace {
  int32_t column, channel, lane, term;  // the channel of the block and of all
  bool there;

  __device__ explicit FinishPlace(int32_t channels) {
    column = device::thread() % kFinishChannels;
    channel = static_cast<int32_t>(device::block()) * kFinishChannels + column;
    lane = device::thread() % kTermThreads / kFinishChannels;
    term = device::thread() / kTermThreads;
    there = channel < channels;
  }
  // One thread a term and channel writes what comes of the sums.
  __device__ bool decides() const { return there && lane == 0; }
};

// The sum over the lanes of the thread's term and channel. Called by all threads; the places are not used again.
__device__ __forceinline__ double sum_lanes(double mine, Shared<double> places) {
  device::store(places + device::thread(), mine);
  device::sync();  // the lanes' sums are there
  const Shared<double> from =
      places + (device::thread() / kTermThreads * kTermThreads + device::thread() % kFinishChannels);
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kFinishLanes; ++i) sum += device::load<double>(from + i * kFinishChannels);
  return sum;
}

}  // namespace effkern::multi_branch_bn::gpu
