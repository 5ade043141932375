// The CUDA kernel of compact, run on the CPU: around the edges of warps, blocks and rounds, every entry size, any
// stride.
#include <algorithm>

#include "check.h"
#include "oracle.h"

// clang-format off: the harness gives the kernel's words their meaning and has to come first
#include "simt.h"
#include "../block_skip/compact.cuh"
// clang-format on

namespace effkern::test {
namespace {

template <class Bits>
void compacts(int64_t n, int64_t columns, bool transposed, Bits magnitude, Bits one, Bits minus_zero, int mix) {
  const int64_t row_stride = transposed ? 1 : columns, column_stride = transposed ? std::max<int64_t>(n, 1) : 1;
  const Guarded mask(static_cast<size_t>(n * columns) * sizeof(Bits));
  const Guarded idx(static_cast<size_t>(n * columns) * 4), count(static_cast<size_t>(columns) * 4);
  Bits* keep = static_cast<Bits*>(mask.data());
  for (int64_t i = 0; i < n * columns; ++i) {
    const int64_t roll = mix == 0 ? 0 : mix == 2 ? 1 : draw(0, 2);
    keep[i] = roll == 1 ? one : roll == 0 ? Bits{0} : minus_zero;
  }
  auto* rows = static_cast<int32_t*>(idx.data());
  auto* counts = static_cast<int32_t*>(count.data());
  simt::launch(static_cast<unsigned>(columns), block_skip::kCompactThreads,
               [&] { block_skip::compact<Bits>(keep, magnitude, n, row_stride, column_stride, rows, counts); });
  for (int64_t c = 0; c < columns; ++c) {
    std::vector<int32_t> want;
    for (int64_t r = 0; r < n; ++r)
      if (keep[r * row_stride + c * column_stride] == one) want.push_back(static_cast<int32_t>(r));
    EXPECT(counts[c] == static_cast<int32_t>(want.size()), "n ", n, " column ", c);
    want.resize(static_cast<size_t>(n), -1);
    EXPECT(std::equal(want.begin(), want.end(), rows + c * n), "n ", n, " column ", c);
  }
}

}  // namespace

TEST(compact_kernel_lists_kept_rows_in_order) {
  for (const int64_t n : {0, 1, 31, 32, 33, 255, 256, 257, 1024, 1025}) compacts<uint8_t>(n, 1, false, 0xff, 1, 0, 1);
  for (const int mix : {0, 2}) compacts<uint8_t>(300, 1, false, 0xff, 1, 0, mix);
}

TEST(compact_kernel_reads_every_type_and_stride) {
  compacts<uint8_t>(70, 3, true, 0xff, 1, 0, 1);
  compacts<uint16_t>(300, 2, false, 0x7fff, 0x3f80, 0x8000, 1);
  compacts<uint32_t>(300, 2, true, 0x7fffffff, 0x3f800000, 0x80000000u, 1);
}

}  // namespace effkern::test
