// How a GPU convolution is run, on the host: which accesses are 16 bytes wide, which tile. Nothing here changes a bit
// of the result, since all tiles sum in the same order, so the choice may follow the number of pixels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_gpu.h"

namespace effkern::conv::gpu {

constexpr int32_t kMostParts = 64, kMostTaps = 32;  // width classes of a launch; rows and columns of a kernel

namespace detail {
template <class T>
bool in_chunks(const T* data, const Strides& strides) {
  constexpr int64_t per = 16 / static_cast<int64_t>(sizeof(T));
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.n % per == 0 && strides.h % per == 0 &&
         strides.w % per == 0;
}
}  // namespace detail

// Operands can be copied 16 bytes at a time: the kernels with kAligned may be used.
template <class T>
bool copies_chunks(const Problem<T>& p) {
  constexpr int64_t per = 16 / static_cast<int64_t>(sizeof(T));
  return detail::in_chunks(p.x.p, p.xs) && detail::in_chunks(p.weight.p, {p.weight_row, p.weight_tap, 0}) &&
         (p.groups == 1 || p.whole.c_in % per == 0);
}

// Sets wide_y and wide_residual. With several groups a part's outputs begin at a multiple of its c_out.
template <class T>
void set_widths(Problem<T>& p) {
  constexpr int64_t per = 16 / static_cast<int64_t>(sizeof(T));
  const bool groups = p.groups == 1 || p.whole.c_out % per == 0;
  p.wide_y = groups && detail::in_chunks<T>(p.y.p, p.ys);
  p.wide_residual = groups && p.residual && detail::in_chunks<T>(p.residual.p, p.rs);
}

enum class Choice { Large, Narrow, Small, Tiny, Unaligned };

// Large tiles where each multiprocessor has one and every other two, small ones from a tile each on, else tiny ones:
// the borders that an H100 gave. Without tensor cores products take the time, the rest of the last tiles counts, and
// large ones never won. Narrow ones where half of a tile's columns would be empty. With lists and parts the counts are
// the most there can be.
template <class T>
Choice choose(const Problem<T>& p, bool fmas, unsigned processors) {
  if (!copies_chunks(p)) return Choice::Unaligned;
  const int64_t rows = static_cast<int64_t>(p.whole.count) * p.out.h * p.out.w;
  const int64_t columns = std::max(p.whole.c_out, p.zero_to), all = processors;
  const auto tiles = [&](int64_t m, int64_t n) { return (rows + m - 1) / m * ((columns + n - 1) / n) * p.groups; };
  if (tiles(64, 64) <= all) return Choice::Tiny;
  if (columns <= 32) return rows * p.groups >= 128 * all ? Choice::Narrow : Choice::Small;
  return !fmas && 2 * tiles(128, 64) >= 3 * all ? Choice::Large : Choice::Small;
}

// Upper bound of the tiles of a launch: each part may end in a tile of few rows.
template <class T>
int64_t most_tiles(const Problem<T>& p, int32_t tile_m, int32_t tile_n) {
  const int64_t rows = static_cast<int64_t>(p.whole.count) * p.out.h * p.out.w;
  const int64_t columns = std::max(p.whole.c_out, p.zero_to);
  return ((rows + tile_m - 1) / tile_m + (p.parts ? kMostParts : 0)) * ((columns + tile_n - 1) / tile_n) * p.groups;
}

}  // namespace effkern::conv::gpu
