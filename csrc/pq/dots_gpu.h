// What the GPU's products with few rows (dots.cuh) are given, how they are laid out, and what they cost.
#pragma once

#include <cstdint>

#include "../common/cuda/stream.h"
#include "../conv/conv_gpu.h"
#include "codes_gpu.h"

namespace effkern::pq {

constexpr int kDotsThreads = 128, kDotsOutputs = 2, kDotsRows = 8;  // outputs of a team; rows of x at a time
constexpr int kCodesBytes = 16;                                     // of a lane's load of codes

// y[r][o] = act(sum * scale[o] + bias[o]), the sum being that of x[r] times the entries that codes[o] names. One stage
// and one book; entries are whole chunks of 8 or 16 bytes.
template <class T>
struct Dots {
  Codes codes;           // [outputs][positions], of 1 or 2 bytes
  Global<const T> book;  // [entries][d], 16-byte aligned
  Global<const T> x;     // rows of positions * d numbers, x_row apart
  int64_t x_row;
  Global<const float> scale, bias;  // null: 1 and 0
  Global<T> y;                      // [rows][outputs]
  int32_t rows, outputs, positions, d;
  conv::gpu::Act act;
  // Set by `plan`.
  int32_t copies;           // of the book in shared memory: a power of two
  int32_t lanes, tiles;     // that share an output, in fp32: a power of two; of 16 outputs in a block, in 16 bits
  int32_t eights;           // of rows at a time, in 16 bits
  bool wide_codes, wide_x;  // 16 bytes of codes, and a chunk of x, at once
};

namespace detail {
template <class T>
int chunk_bytes(const Dots<T>& p) {
  const int64_t entry = p.d * static_cast<int64_t>(sizeof(T));
  return entry % 16 == 0 ? 16 : entry % 8 == 0 && sizeof(T) == 2 ? 8 : 0;
}
// Chunks of x from lane to lane: odd, so that lanes read from different banks.
template <class T>
int64_t pitch(const Dots<T>& p, int chunk) {
  return int64_t{kCodesBytes} / p.codes.bytes * p.d * static_cast<int64_t>(sizeof(T)) / chunk + 1;
}
}  // namespace detail

template <class T>
int64_t shared_of(const Dots<T>& p) {
  const int chunk = detail::chunk_bytes(p);
  const int64_t book = int64_t{1} * p.codes.entries * p.d * static_cast<int64_t>(sizeof(T)) * p.copies;
  return book + (p.rows == 1 ? 1 : kDotsRows) * p.lanes * detail::pitch(p, chunk) * chunk;
}

// How lanes share the work; false where the kernel cannot run. Follows from everything but the number of rows, which
// therefore changes no bit of a row's result.
template <class T>
bool plan(Dots<T>& p) {
  constexpr int64_t kBook = 48 << 10, kCopies = 32 << 10, kRows = 48 << 10;
  const int chunk = detail::chunk_bytes(p);
  const int64_t book = int64_t{1} * p.codes.entries * p.d * static_cast<int64_t>(sizeof(T));
  if (chunk == 0 || p.codes.bytes > 2 || book > kBook || reinterpret_cast<uintptr_t>(p.book.p) % 16 != 0) return false;
  for (p.copies = 1; p.copies * chunk < 128 && 2 * p.copies * book <= kCopies;) p.copies *= 2;
  const int64_t lane = kDotsRows * detail::pitch(p, chunk) * chunk;
  if (lane > kRows) return false;
  const int32_t a_lane = kCodesBytes / p.codes.bytes;
  for (p.lanes = 1; p.lanes < 32 && p.lanes * a_lane < p.positions && 2 * p.lanes * lane <= kRows;) p.lanes *= 2;
  p.wide_codes =
      p.positions % a_lane == 0 && reinterpret_cast<uintptr_t>(p.codes.p.p) % static_cast<uintptr_t>(kCodesBytes) == 0;
  p.wide_x = reinterpret_cast<uintptr_t>(p.x.p) % 16 == 0 && p.x_row * static_cast<int64_t>(sizeof(T)) % chunk == 0;
  return true;
}

// Blocks' worth of work: groups of outputs times blocks of rows.
template <class T>
int64_t dots_items(const Dots<T>& p) {
  const int64_t outputs = kDotsThreads / p.lanes * kDotsOutputs;
  return (p.outputs + outputs - 1) / outputs * ((p.rows + kDotsRows - 1) / kDotsRows);
}

// Bytes that the kernel's instructions move in a launch of `blocks` blocks. The codes are the only part that comes from
// memory; the book and x are read again by every block.
struct DotsWork {
  int64_t bytes_codes = 0, bytes_book = 0, bytes_x = 0, bytes_y = 0;
};

template <class T>
DotsWork dots_work(const Dots<T>& p, int64_t blocks) {
  const int64_t size = sizeof(T), teams = kDotsThreads / p.lanes, items = dots_items(p);
  const int64_t tiles = (p.rows + kDotsRows - 1) / kDotsRows, groups = items / tiles;
  const int64_t a_segment = int64_t{p.lanes} * (kCodesBytes / p.codes.bytes);
  const bool once = p.positions <= a_segment;  // then x stays in shared memory while the block of rows is the same
  DotsWork work;
  work.bytes_codes = items * teams * kDotsOutputs * p.positions * p.codes.bytes;
  work.bytes_book = blocks * p.codes.entries * p.d * size * p.copies;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t id = block, last = -1; id < items; id += blocks) {
      const int64_t tile = id / groups, rows = tile + 1 < tiles ? kDotsRows : p.rows - tile * kDotsRows;
      if (!once || tile != last) work.bytes_x += rows * p.positions * p.d * size;
      last = tile;
    }
  work.bytes_y = int64_t{1} * p.rows * p.outputs * size;
  return work;
}

// Launches the kernel for a plan and at least one row and output: on tensor cores (dots_mma.cuh) but in fp32.
void run(const Dots<device::F16>& dots, device::Stream stream);
void run(const Dots<device::BF16>& dots, device::Stream stream);
void run(const Dots<float>& dots, device::Stream stream);

}  // namespace effkern::pq
