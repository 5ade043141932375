#include "kmeans.h"

#include <algorithm>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace effkern::host {
namespace {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// Sixteen entries of the book in the lanes, so that any d vectorises. book is [k / 16][d][16], the tail at +inf.
__attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default"))) void assign_rows(
    const float* x, const float* book, int64_t begin, int64_t end, int64_t blocks, int64_t d, int64_t* codes,
    float* distance) {
  for (int64_t i = begin; i < end; ++i) {
    const float* row = x + i * d;
    Lanes best = {};
    best += std::numeric_limits<float>::infinity();
    Lanes where = {};  // block number of the best entry; exact in float up to 2^24 blocks
    for (int64_t b = 0; b < blocks; ++b) {
      const float* entries = book + b * d * kLanes;
      Lanes sum = {};
      for (int64_t t = 0; t < d; ++t) {
        Lanes entry;
        __builtin_memcpy(&entry, entries + t * kLanes, sizeof entry);
        const Lanes difference = row[t] - entry;
        sum += difference * difference;
      }
      const auto nearer = sum < best;
      best = nearer ? sum : best;
      where = nearer ? Lanes{} + static_cast<float>(b) : where;
    }
    int64_t code = 0;
    float least = std::numeric_limits<float>::infinity();
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t candidate = static_cast<int64_t>(where[lane]) * kLanes + lane;
      if (best[lane] < least || (best[lane] == least && candidate < code)) {
        least = best[lane];
        code = candidate;
      }
    }
    codes[i] = code;
    if (distance != nullptr) distance[i] = least;
  }
}

std::vector<float> in_lanes(const float* book, int64_t k, int64_t d) {
  const int64_t blocks = (k + kLanes - 1) / kLanes;
  std::vector<float> out(static_cast<size_t>(blocks * d * kLanes), std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < k; ++j)
    for (int64_t t = 0; t < d; ++t) out[(j / kLanes * d + t) * kLanes + j % kLanes] = book[j * d + t];
  return out;
}

}  // namespace

void assign(const float* x, const float* book, int64_t n, int64_t k, int64_t d, int threads, int64_t* codes,
            float* distance) {
  const std::vector<float> lanes = in_lanes(book, k, d);
  const int64_t blocks = (k + kLanes - 1) / kLanes;
  const int64_t workers = std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, n / 1024));
  const auto share = [&](int64_t w) {
    assign_rows(x, lanes.data(), n * w / workers, n * (w + 1) / workers, blocks, d, codes, distance);
  };
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(workers));
  int64_t started = 1;
  try {
    for (; started < workers; ++started) pool.emplace_back(share, started);
  } catch (const std::system_error&) {
    // The system gives no more threads: this one does what is left.
  }
  share(0);
  for (; started < workers; ++started) share(started);
  for (std::thread& thread : pool) thread.join();
}

void update(const float* x, const int64_t* codes, int64_t n, int64_t k, int64_t d, float* mean, int64_t* counts) {
  std::vector<double> sum(static_cast<size_t>(k * d), 0.0);
  std::fill(counts, counts + k, int64_t{0});
  for (int64_t i = 0; i < n; ++i) {
    double* row = sum.data() + codes[i] * d;
    ++counts[codes[i]];
    for (int64_t t = 0; t < d; ++t) row[t] += x[i * d + t];
  }
  for (int64_t j = 0; j < k; ++j)
    for (int64_t t = 0; t < d; ++t)
      mean[j * d + t] = counts[j] ? static_cast<float>(sum[j * d + t] / static_cast<double>(counts[j])) : 0.0F;
}

}  // namespace effkern::host
