// Runs a CUDA kernel on the CPU, for its results, not its speed: one operating-system thread a CUDA thread, barriers
// for
// __syncthreads and the warp votes. Include before the .cuh. A barrier that not all threads reach hangs, as on a GPU.
#pragma once

#include <barrier>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__ inline
#define __device__ inline
#define __shared__ static  // blocks run one after the other, so one copy for all threads is one for the block

namespace effkern::test::simt {

struct Index {
  unsigned x = 0;
};

struct Warp {
  explicit Warp(int lanes) : meet(lanes) {}
  std::barrier<> meet;
  uint32_t votes = 0;
};

struct Block {
  explicit Block(int threads) : meet(threads) {
    for (int i = 0; i < threads; i += 32) warps.push_back(std::make_unique<Warp>(std::min(32, threads - i)));
  }
  std::barrier<> meet;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Index thread_index, block_index;
inline thread_local Block* block = nullptr;

inline void sync_threads() { block->meet.arrive_and_wait(); }

inline unsigned ballot(unsigned, bool vote) {
  Warp& warp = *block->warps[thread_index.x / 32];
  const unsigned bit = 1u << thread_index.x % 32;
  if (thread_index.x % 32 == 0) warp.votes = 0;
  warp.meet.arrive_and_wait();
  if (vote) __atomic_fetch_or(&warp.votes, bit, __ATOMIC_RELAXED);
  warp.meet.arrive_and_wait();
  const unsigned all = warp.votes;
  warp.meet.arrive_and_wait();
  return all;
}

inline void launch(unsigned blocks, int threads, const std::function<void()>& kernel) {
  for (unsigned b = 0; b < blocks; ++b) {
    Block state(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        thread_index.x = static_cast<unsigned>(t);
        block_index.x = b;
        block = &state;
        kernel();
      });
    for (std::thread& thread : pool) thread.join();
  }
}

}  // namespace effkern::test::simt

#define threadIdx (::effkern::test::simt::thread_index)
#define blockIdx (::effkern::test::simt::block_index)
#define __syncthreads ::effkern::test::simt::sync_threads
#define __ballot_sync ::effkern::test::simt::ballot
#define __popc __builtin_popcount
