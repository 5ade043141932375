// The inner loops of coded weights, one table per instruction set. Raw pointers only.
#pragma once

#include <cstdint>

#include "../common/cpu.h"

namespace effkern::pq {

enum class CodeType : int { U8, I16, U16, I32 };

// What body.template operator()<Code>() returns, called with the C++ type of the codes.
template <class Body>
auto with_code(CodeType type, const Body& body) {
  switch (type) {
    case CodeType::U8:
      return body.template operator()<uint8_t>();
    case CodeType::I16:
      return body.template operator()<int16_t>();
    case CodeType::U16:
      return body.template operator()<uint16_t>();
    case CodeType::I32:
      break;
  }
  return body.template operator()<int32_t>();
}

constexpr int64_t kOutputs = 16;         // outputs decoded together: a panel of the convolution engine
constexpr int64_t kLanes = 8;            // partial sums of an output (decode_fma), rows of a table (lut): one ymm
constexpr int64_t kTableEntries = 256;   // of a look-up table of kLanes floats each: 8 KiB
constexpr int64_t kTables = 4;           // tables used in one pass over the outputs: an L1 cache of 32 KiB
constexpr int64_t kTablePositions = 32;  // positions whose table rows are listed together

struct Kernels {
  // out[i * 16 + r] = min(codes[r * pitch + i], last) * d for i < count, negative codes counting as large; rows past
  // `rows` repeat row 0. False if a code was larger than `last` or negative.
  bool (*offsets)(const void* codes, CodeType type, int64_t pitch, int64_t rows, int64_t count, uint32_t last,
                  uint32_t d, uint32_t* out);

  // Decodes `count` positions of 16 rows into a panel: column t of position i goes to columns[t] + i * advance, 16
  // floats. A position is the sum, in order, of `stages` book rows; offsets are [count][stages][16].
  void (*panel)(const float* book, const uint32_t* offsets, int64_t count, int64_t stages, int64_t d,
                float* const* columns, int64_t advance);

  // acc[(r * 16 + o) * 8 ...] += entry(o, i) * x[r][i * d ...] lane by lane, for `count` positions, `rows` rows and
  // 16 outputs: lane l of an accumulator sums the products of columns l, l + 8, l + 16, ... in order, whatever `rows`
  // is. d is 4 or a multiple of 8; with d = 4 two positions make a vector, and `count` is even.
  void (*dots)(const float* book, const uint32_t* offsets, int64_t count, int64_t stages, int64_t d,
               const float* const* x, int64_t rows, float* acc);
  int64_t dot_rows;  // rows that one pass of `dots` keeps in registers

  // c[i] = sum of the 8 lanes of acc[i * 8 ...], in a fixed order; count is a multiple of 8.
  void (*reduce)(const float* acc, int64_t count, float* c);

  // out[i / 4 * out_pitch + o * 4 + i % 4] = byte offset of row min(codes[o * pitch + i], last) in a table, i < count
  // <= kTablePositions, rounded up to a multiple of 4. False if a code was larger than `last` or negative.
  bool (*table_rows)(const void* codes, CodeType type, int64_t pitch, int64_t outputs, int64_t count, uint32_t last,
                     uint16_t* out, int64_t out_pitch);

  // out[k][8] = sum over t < length of book[k * d + t] * x[t][8], k < entries.
  void (*fill_table)(const float* book, int64_t entries, int64_t d, int64_t length, const float* x, float* out);

  // acc[o][8] += tables[0] at rows[o][0], + tables[1] at rows[o][1], ... one after the other, for `count` of the 4
  // tables, o < outputs.
  void (*lookup)(const float* tables, int64_t count, const uint16_t* rows, int64_t outputs, float* acc);

  // c[r * 16 + o] = acc[o * 8 + r] for 16 outputs and 8 rows.
  void (*turn)(const float* acc, float* c);
};

const Kernels& kernels(Isa isa);

namespace scalar {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

}  // namespace effkern::pq
