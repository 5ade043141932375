// Parallel loops for tests of the engine, which links no thread pool.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "../common/parallel.h"

namespace effkern::test {

inline int64_t three() { return 3; }
inline int64_t one() { return 1; }

// Each third of the range on a thread of its own.
inline void on_threads(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> pool;
  const int64_t step = (end - begin + 2) / 3;
  for (int64_t b = begin; b < end; b += step)
    pool.emplace_back([&body, b, e = std::min(end, b + step)] { body(b, e); });
  for (std::thread& thread : pool) thread.join();
}

inline void serially(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(begin, end);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace effkern::test
