// What the GPU's lookup of coded rows (embedding.cuh) is given.
#pragma once

#include <cstdint>

#include "../common/cuda/indices.h"
#include "../common/cuda/stream.h"
#include "codes_gpu.h"

namespace effkern::pq {

// Codes [rows][positions][stages] and books [books][entries][d], dense. books is 1, or `positions` (a book per
// position), or `stages`. Bag b of the output is the sum of the rows idx[offsets[b]] to idx[offsets[b + 1] - 1], or the
// one row idx[b] without offsets. Indices, offsets and codes outside of their range are held to it.
template <class T>
struct Lookup {
  device::Indices idx, offsets;  // offsets may have no words
  Codes codes;
  Global<const T> book;
  Global<const float> scale, weights;  // by row and by index; null: 1
  Global<T> y;                         // [bags][positions * d]
  int32_t count, bags, rows, positions, stages, d;
  bool book_per_position, book_per_stage, mean;
  int32_t padding;  // a row that counts as none; -1: none is
  bool wide;        // an entry is whole chunks of 16 bytes, and so is all of y
};

// Bytes that the kernel's instructions move for bags that name `named` rows, `kept` of them no padding: each lane asks
// for its chunk's codes and factors itself, and L1 answers the lanes of a warp at once.
struct LookupWork {
  int64_t bytes_in, bytes_y;
};
template <class T>
LookupWork lookup_work(const Lookup<T>& p, int64_t named, int64_t kept) {
  const int64_t size = sizeof(T), chunk = p.wide ? 16 : size, width = int64_t{p.positions} * p.d;
  const int64_t chunks = width * size / chunk, factors = (p.scale ? 4 : 0) + (p.weights ? 4 : 0);
  const int64_t starts = p.offsets.words && p.bags > 0 ? (2 * int64_t{p.bags} - 1) * 32 * (p.offsets.wide ? 8 : 4) : 0;
  return {starts + chunks * (named * (p.idx.wide ? 8 : 4) + kept * (factors + p.stages * (p.codes.bytes + chunk))),
          p.bags * width * size};
}

void run(const Lookup<device::F16>& lookup, device::Stream stream);
void run(const Lookup<device::BF16>& lookup, device::Stream stream);
void run(const Lookup<float>& lookup, device::Stream stream);

}  // namespace effkern::pq
