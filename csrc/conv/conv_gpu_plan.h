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

enum class Choice { Large, Narrow, Small, Unaligned };

// Small tiles when large ones would not fill the device once; narrow ones when half of a tile's columns would be empty.
// With lists and parts the counts are the most there can be.
template <class T>
Choice choose(const Problem<T>& p, int32_t large_m, int32_t large_n, unsigned processors) {
  if (!copies_chunks(p)) return Choice::Unaligned;
  const int64_t rows = static_cast<int64_t>(p.whole.count) * p.out.h * p.out.w;
  const int64_t columns = std::max(p.whole.c_out, p.zero_to);
  const int64_t large = (rows + large_m - 1) / large_m * ((columns + large_n - 1) / large_n) * p.groups;
  if (columns <= 32) return rows * p.groups >= 128 * static_cast<int64_t>(processors) ? Choice::Narrow : Choice::Small;
  return large >= processors ? Choice::Large : Choice::Small;
}

// Upper bound of the tiles of a launch: each part may end in a tile of few rows.
template <class T>
int64_t most_tiles(const Problem<T>& p, int32_t tile_m, int32_t tile_n) {
  const int64_t rows = static_cast<int64_t>(p.whole.count) * p.out.h * p.out.w;
  const int64_t columns = std::max(p.whole.c_out, p.zero_to);
  return ((rows + tile_m - 1) / tile_m + (p.parts ? kMostParts : 0)) * ((columns + tile_n - 1) / tile_n) * p.groups;
}

}  // namespace effkern::conv::gpu
