// What the GPU's lookup of coded rows (embedding.cuh) is given.
#pragma once

#include <cstdint>

#include "../common/cuda/indices.h"
#include "../common/cuda/stream.h"

namespace effkern::pq {

using device::Global;

// Codes [rows][positions][stages] and books [books][entries][d], dense. books is 1, or `positions` (a book per
// position), or `stages`. Bag b of the output is the sum of the rows idx[offsets[b]] to idx[offsets[b + 1] - 1], or the
// one row idx[b] without offsets. Indices, offsets and codes outside of their range are held to it.
template <class T>
struct Lookup {
  device::Indices idx, offsets;  // offsets may have no words
  Global<const char> codes;
  int32_t code_bytes;
  bool signed_codes;
  Global<const T> book;
  Global<const float> scale, weights;  // by row and by index; null: 1
  Global<T> y;                         // [bags][positions * d]
  int32_t count, bags, rows, positions, stages, entries, d;
  bool book_per_position, book_per_stage, mean;
  int32_t padding;  // a row that counts as none; -1: none is
  bool wide;        // an entry is whole chunks of 16 bytes, and so is all of y
};

void run(const Lookup<device::F16>& lookup, device::Stream stream);
void run(const Lookup<device::BF16>& lookup, device::Stream stream);
void run(const Lookup<float>& lookup, device::Stream stream);

}  // namespace effkern::pq
