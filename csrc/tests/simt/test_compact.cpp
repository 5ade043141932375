// The CUDA kernel of compact: around the edges of warps, blocks and rounds, every entry size, any stride, every
// schedule.
#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "../../block_skip/compact.cuh"
#include "../check.h"
#include "launch.h"

namespace effkern::test::simt {
namespace {

template <class T>
device::Global<T> global(Memory& memory) {
  return {reinterpret_cast<T*>(memory.data()), &memory};
}

std::mt19937& dice() {
  static std::mt19937 engine(5);
  return engine;
}

template <class Bits>
void compacts(int64_t n, int64_t columns, bool transposed, Bits magnitude, Bits one, Bits minus_zero, int mix,
              int seeds = 2, bool rest = false) {
  const int64_t row_stride = transposed ? 1 : columns, column_stride = transposed ? std::max<int64_t>(n, 1) : 1;
  Memory mask("keep", static_cast<size_t>(n * columns) * sizeof(Bits), kReadable | kDefined, sizeof(Bits));
  Memory idx("idx", static_cast<size_t>(n * columns) * 4, kWritable, 4),
      count("count", static_cast<size_t>(columns) * 4, kWritable, 4);
  const auto entry = [&](int64_t i) { return mask.data() + i * static_cast<int64_t>(sizeof(Bits)); };
  for (int64_t i = 0; i < n * columns; ++i) {
    const uint32_t roll = mix == 0 ? 0 : mix == 2 ? 1 : dice()() % 3;
    const Bits value = roll == 1 ? one : roll == 0 ? Bits{0} : minus_zero;
    std::memcpy(entry(i), &value, sizeof(Bits));
  }
  const auto number = [](const Memory& memory, int64_t i) {
    int32_t value = 0;
    std::memcpy(&value, memory.data() + 4 * i, 4);
    return value;
  };
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    idx.poison(), count.poison();
    const Launch launch{.grid = static_cast<unsigned>(columns),
                        .threads = block_skip::kCompactThreads,
                        .shared = block_skip::kCompactShared,
                        .seed = seed,
                        .granule = 4,
                        .counters = seed == 0};
    Report report = run(launch, [&] {
      block_skip::compact<Bits>(global<const Bits>(mask), magnitude, n, row_stride, column_stride, global<int32_t>(idx),
                                global<int32_t>(count), rest);
    });
    EXPECT(report.ok(), report.what);
    if (launch.counters) {
      const block_skip::CompactWork work = block_skip::compact_work(n, columns, sizeof(Bits));
      EXPECT(report.cost[Op::LoadGlobal].asked == work.bytes_keep);
      EXPECT(report.cost[Op::StoreGlobal].asked == work.bytes_lists);
    }
    for (int64_t c = 0; c < columns; ++c) {
      std::vector<int32_t> want;
      for (int64_t r = 0; r < n; ++r)
        if (std::memcmp(entry(r * row_stride + c * column_stride), &one, sizeof(Bits)) == 0)
          want.push_back(static_cast<int32_t>(r));
      EXPECT(number(count, c) == static_cast<int32_t>(want.size()), "n ", n, " column ", c);
      const size_t kept = want.size();
      want.resize(static_cast<size_t>(n), -1);
      for (int64_t r = n - 1, at = static_cast<int64_t>(kept); rest && r >= 0; --r)
        if (std::find(want.begin(), want.begin() + static_cast<int64_t>(kept), r) ==
            want.begin() + static_cast<int64_t>(kept))
          want[static_cast<size_t>(at++)] = static_cast<int32_t>(r);
      for (int64_t i = 0; i < n; ++i) {
        EXPECT(number(idx, c * n + i) == want[static_cast<size_t>(i)], "n ", n, " column ", c, " entry ", i);
        EXPECT(idx.stores(static_cast<size_t>(c * n + i) * 4) == 1);
      }
    }
  }
}

}  // namespace

TEST(compact_kernel_lists_kept_rows_in_order) {
  for (const int64_t n : {0, 1, 31, 32, 33, 255, 256, 257, 1025})
    compacts<uint8_t>(n, 1, false, 0xff, 1, 0, 1, kSchedules);
  for (const int mix : {0, 2}) compacts<uint8_t>(300, 1, false, 0xff, 1, 0, mix);
}

TEST(compact_kernel_lists_dropped_rows_behind) {
  for (const int64_t n : {0, 1, 33, 257, 700}) compacts<uint8_t>(n, 2, false, 0xff, 1, 0, 1, kSchedules, true);
  for (const int mix : {0, 2}) compacts<uint32_t>(70, 1, false, 0x7fffffff, 0x3f800000, 0x80000000u, mix, 2, true);
}

TEST(compact_kernel_reads_every_type_and_stride) {
  compacts<uint8_t>(70, 3, true, 0xff, 1, 0, 1);
  compacts<uint16_t>(300, 2, false, 0x7fff, 0x3f80, 0x8000, 1);
  compacts<uint32_t>(300, 2, true, 0x7fffffff, 0x3f800000, 0x80000000u, 1);
}

}  // namespace effkern::test::simt
