// The parallel loop of the engine. Kernels know no torch: the library that links torch plugs torch's own thread pool
// in at load time, C++ tests and sanitizer builds run serially or plug in their own.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

namespace effkern {

using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             const std::function<void(int64_t, int64_t)>& body);

// Replaces the loop (default: serial); `threads` tells how many threads it may use at the moment.
void set_parallel(ParallelFor loop, int64_t (*threads)());

int64_t num_threads();

// Calls body(begin, end) on disjoint ranges that cover [begin, end). The first exception thrown by a body is rethrown
// here, after the loop: an exception must not cross the thread pool.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace effkern
