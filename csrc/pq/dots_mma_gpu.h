// How products of few rows run on tensor cores (dots_mma.cuh): the layout of a block, and what it costs.
#pragma once

#include "dots_gpu.h"

namespace effkern::pq {

constexpr int kMmaWarps = 8, kMmaThreads = 32 * kMmaWarps;  // share the positions of a block's outputs

// Rows at a time where there are more than eight, and rows up to which that is taken: each block of them decodes anew.
constexpr int kMmaEights = 4, kMmaRows = 64;

constexpr int mma_blocks(int tiles, int eights) { return eights > 1 ? 1 : 3 - tiles; }  // of a multiprocessor
// Numbers from row to row of x in a warp's sums: lanes that store together meet in no bank.
constexpr int mma_pitch(int tiles) { return 16 * tiles + 4; }
// Positions of a lane's load of codes.
template <class T>
EFFKERN_BOTH int32_t mma_segment(const Dots<T>& p) {
  return kCodesBytes / p.codes.bytes;
}

// The book's copies and an entry of zeros, then the warps' sums.
template <class T>
EFFKERN_BOTH int32_t mma_book_bytes(const Dots<T>& p) {
  return (p.codes.entries + 1) * p.d * static_cast<int32_t>(sizeof(T)) * p.copies;
}
template <class T>
int32_t mma_shared(const Dots<T>& p) {
  return mma_book_bytes(p) + kMmaWarps * kDotsRows * p.eights * mma_pitch(p.tiles) * 4;
}

// As `plan` of dots_gpu.h: sets what `Dots` leaves to it. Tiles and eights change no bit of a row's result, whose sums
// are its own.
template <class T>
  requires(sizeof(T) == 2)
bool plan(Dots<T>& p) {
  constexpr int64_t kBook = 48 << 10, kCopies = 32 << 10;
  const int chunk = detail::chunk_bytes(p);
  const int64_t book = int64_t{1} * p.codes.entries * p.d * static_cast<int64_t>(sizeof(T));
  if (chunk == 0 || p.codes.bytes > 2 || book > kBook || reinterpret_cast<uintptr_t>(p.book.p) % 16 != 0) return false;
  for (p.copies = 1; p.copies * chunk < 128 && 2 * p.copies * book <= kCopies;) p.copies *= 2;
  p.eights = p.rows > kDotsRows ? kMmaEights : 1;
  // Two halve the reads of x, where blocks are enough for a device all the same or x is most of what is read.
  p.tiles = p.outputs > 2048 || p.eights > 1 ? 2 : 1;
  p.wide_codes = p.positions % mma_segment(p) == 0 &&
                 reinterpret_cast<uintptr_t>(p.codes.p.p) % static_cast<uintptr_t>(kCodesBytes) == 0;
  p.wide_x = reinterpret_cast<uintptr_t>(p.x.p) % 16 == 0 && p.x_row * static_cast<int64_t>(sizeof(T)) % chunk == 0;
  return true;
}

// Blocks' worth of rows.
template <class T>
int64_t mma_row_tiles(const Dots<T>& p) {
  return (p.rows + kDotsRows * p.eights - 1) / (kDotsRows * p.eights);
}
template <class T>
  requires(sizeof(T) == 2)
int64_t dots_items(const Dots<T>& p) {
  const int64_t outputs = 16 * p.tiles;
  return (p.outputs + outputs - 1) / outputs * mma_row_tiles(p);
}

// Four lanes read the same 16 bytes of codes, or each its own where they are not aligned.
template <class T>
  requires(sizeof(T) == 2)
DotsWork dots_work(const Dots<T>& p, int64_t blocks) {
  const int64_t tiles = mma_row_tiles(p), groups = dots_items(p) / tiles;
  const int64_t outputs = groups * tiles * 16 * p.tiles, size = sizeof(T);
  DotsWork work;
  work.bytes_codes = outputs * p.positions * p.codes.bytes * (p.wide_codes ? 4 : 1);
  work.bytes_book = (blocks < groups * tiles ? blocks : groups * tiles) * p.codes.entries * p.d * size;
  work.bytes_x = groups * p.rows * p.positions * p.d * size;
  work.bytes_y = int64_t{1} * p.rows * p.outputs * size;
  return work;
}

}  // namespace effkern::pq
