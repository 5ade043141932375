// What the GPU's decoder (decode.cuh) is given.
#pragma once

#include <cstdint>

#include "../common/cuda/stream.h"
#include "codes_gpu.h"

namespace effkern::pq {

// Codes [rows][positions][stages] and books [books][entries][d], dense, name coded rows of positions * d numbers.
// Number channel * taps + tap of a row becomes y[row][tap][channel]; what a row has past taps * channels is left out.
template <class T>
struct Decoding {
  Codes codes;
  Global<const T> book;
  Global<const float> scale;  // by row; null: 1
  Global<T> y;                // [rows][taps][channels]
  int32_t rows, positions, stages, d, taps, channels;
  bool book_per_position, book_per_stage;
};

// How often a warp's 32 chunks of `per` numbers fit in a row of y, the last time in part.
template <class T>
EFFKERN_BOTH int32_t decode_rounds(const Decoding<T>& p, int32_t per) {
  return (p.taps * p.channels + 32 * per - 1) / (32 * per);
}

// Launches the kernel; nothing for an empty y.
void run(const Decoding<device::F16>& decoding, device::Stream stream);
void run(const Decoding<device::BF16>& decoding, device::Stream stream);
void run(const Decoding<float>& decoding, device::Stream stream);

// Bytes that its instructions move: every chunk of y once, and for it codes and numbers of the book.
struct DecodeWork {
  int64_t bytes_codes = 0, bytes_book = 0, bytes_y = 0;
};

// `per` numbers of y are made at once, of one entry (`whole`), or each from its own code and entry.
template <class T>
DecodeWork decode_work(const Decoding<T>& p, int64_t per, bool whole) {
  const int64_t numbers = static_cast<int64_t>(p.rows) * p.taps * p.channels, size = sizeof(T);
  const int64_t codes = (whole ? numbers / per : numbers) * p.stages;
  return {codes * p.codes.bytes, numbers * p.stages * size, numbers * size};
}

}  // namespace effkern::pq
