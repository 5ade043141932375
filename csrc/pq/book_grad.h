// What the gradient of a codebook (book_grad.cuh) is given.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/cuda/indices.h"
#include "../common/cuda/stream.h"
#include "codes_gpu.h"

namespace effkern::pq {

constexpr int kBookGradThreads = 256, kBookGradWarps = kBookGradThreads / 32, kBookGradFloats = 8192;  // of a table

// Rows of numbers behind coded rows, as the gradient of what a lookup (embedding_gpu.h) or a decoder makes: row i is
// that of coded row picked[i], and lies in row bags[i] of values.
template <class T>
struct CodedRows {
  Codes codes;  // [coded][positions][stages], dense
  int32_t coded, positions, stages, d;
  bool book_per_position, book_per_stage;
  int32_t rows;
  device::Indices picked, bags;  // without words: i
  int32_t value_rows, padding;   // padding: a coded row whose numbers count as 0; -1: none
  Global<const T> values;
  int64_t pitch;
  int32_t columns;                     // numbers of a row; those from here to positions * d count as 0
  Global<const float> scale, weights;  // by coded row and by row; null: 1
};

// parts[slice][book][entry][element] = the sums of scale * weight * values over a slice of the rows, in order.
template <class T>
struct BookGrad {
  CodedRows<T> of;
  Global<float> parts;
  int32_t books;
  int32_t slices, slice;  // of the rows, and rows of one
  int32_t width, chunk;   // elements and entries of a block's table
};

template <class T>
EFFKERN_BOTH int32_t book_tables(const BookGrad<T>& p) {
  return (p.of.d + p.width - 1) / p.width * ((p.of.codes.entries + p.chunk - 1) / p.chunk);
}

// From shapes alone; tables of kBookGradFloats, as many blocks as two a multiprocessor of a large device.
template <class T>
void set_slices(BookGrad<T>& p) {
  p.books = p.of.book_per_position ? p.of.positions : p.of.book_per_stage ? p.of.stages : 1;
  p.width = std::min(p.of.d, 256);
  p.chunk = std::min(p.of.codes.entries, kBookGradFloats / p.width);
  const int64_t blocks = int64_t{book_tables(p)} * p.books, codes = int64_t{p.of.positions} * p.of.stages;
  const int64_t most = std::max<int64_t>(1, INT32_MAX / 2 / codes);  // codes of a slice are counted in 32 bits
  const int64_t wanted = std::min<int64_t>(std::max<int64_t>(1, (264 + blocks - 1) / blocks),
                                           std::max<int64_t>(1, p.of.rows * codes / 1024));
  p.slice = static_cast<int32_t>(std::clamp<int64_t>((p.of.rows + wanted - 1) / wanted, 1, most));
  p.slices = static_cast<int32_t>(std::max<int64_t>(1, (int64_t{p.of.rows} + p.slice - 1) / p.slice));
}

// to[i] = the slices' sums in order, in fp64 and rounded once.
template <class U>
struct BookFold {
  Global<const float> parts;
  Global<U> to;
  int64_t size;
  int32_t slices;
};

// dots[i] = <values of row i, its numbers without scale>; by_weight[i] = dots[i] * scale, by_scale[i] = dots[i] *
// weight where they are given.
template <class T>
struct RowDots {
  CodedRows<T> of;
  Global<const float> book;
  Global<float> by_scale, by_weight;
};

// Bytes that the kernels' instructions ask for where `kept` rows are no padding: every lane its own, so codes count
// once for each warp that looks at them.
struct BookWork {
  int64_t bytes_read, bytes_written;
};
inline int64_t list_bytes(const device::Indices& list, int64_t asked) {
  return list.words ? asked * (list.wide ? 8 : 4) : 0;
}
template <class T>
BookWork book_grad_work(const BookGrad<T>& p, int64_t kept) {
  const CodedRows<T>& of = p.of;
  const int64_t codes = int64_t{of.positions} * of.stages, looks = int64_t{book_tables(p)} * kBookGradWarps * codes;
  const int64_t adds = (of.d + p.width - 1) / p.width * kept * codes;
  return {looks * kept * of.codes.bytes + list_bytes(of.picked, looks * of.rows) + list_bytes(of.bags, adds) +
              adds * ((of.scale ? 4 : 0) + (of.weights ? 4 : 0)) +
              kept * of.stages * of.columns * static_cast<int64_t>(sizeof(T)),
          int64_t{p.slices} * p.books * of.codes.entries * of.d * 4};
}
template <class T>
BookWork row_dots_work(const RowDots<T>& p, int64_t kept) {
  const CodedRows<T>& of = p.of;
  const int64_t numbers = kept * of.columns, lanes = int64_t{32} * of.rows;
  return {numbers * (of.stages * (of.codes.bytes + 4) + static_cast<int64_t>(sizeof(T))) +
              list_bytes(of.picked, lanes) + list_bytes(of.bags, lanes) +
              (p.by_scale && of.weights ? 4 * int64_t{of.rows} : 0) + (p.by_weight && of.scale ? 4 * kept : 0),
          ((p.by_scale ? 4 : 0) + (p.by_weight ? 4 : 0)) * int64_t{of.rows}};
}
template <class U>
BookWork book_fold_work(const BookFold<U>& p) {
  return {p.size * p.slices * 4, p.size * static_cast<int64_t>(sizeof(U))};
}

// One launch each.
template <class T>
void run(const BookGrad<T>& p, device::Stream stream);
template <class U>
void run(const BookFold<U>& p, device::Stream stream);
template <class T>
void run(const RowDots<T>& p, device::Stream stream);

}  // namespace effkern::pq
