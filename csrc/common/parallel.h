// The parallel loop of the engine. Kernels know no torch: the library that links torch plugs torch's own thread pool
// in at load time, C++ tests and sanitizer builds run serially or plug in their own.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <span>

namespace effkern {

using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             const std::function<void(int64_t, int64_t)>& body);

// Replaces the loop (default: serial); `threads` tells how many threads it may use at the moment.
void set_parallel(ParallelFor loop, int64_t (*threads)());

int64_t num_threads();

// Calls body(begin, end) on disjoint ranges that cover [begin, end). The first exception thrown by a body is rethrown
// here, after the loop: an exception must not cross the thread pool.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// A thread's share of a step is cut into pieces, of which others may take over those that are not begun.
constexpr int64_t kPieces = 4;

// A step of a longer work: units [0, units), in any order and on any thread.
struct Step {
  int64_t units = 0;
  std::function<void(int64_t begin, int64_t end)> run;
  int64_t pieces = kPieces;  // at most kPieces
};

// Does the steps one after the other, each on up to `threads` threads, with one fork and one join around them all. A
// step begins when all units of the one before are done. Every thread has a share of a step's units, the same at every
// call, so that what it wrote is read by itself; it takes over the shares of threads that do not come (the pool may
// grant fewer than asked for, or wake them late), so that nobody waits for a thread that has not begun. The first
// exception ends the work and is rethrown here.
void parallel_steps(std::span<const Step> steps, int64_t threads);

}  // namespace effkern
