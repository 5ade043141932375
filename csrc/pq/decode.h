// Weights held as codes: rows of a codebook named by integers, decoded a row or a panel of 16 outputs at a time. Raw
// pointers only.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "../conv/problem.h"
#include "kernels.h"

namespace effkern::pq {

// Codes [rows][positions][stages], dense, and the books [books][entries][d] they point into, fp32, dense, of fewer than
// 2^32 numbers in all. books is 1, or `positions` where stages == 1 (a book per position), or `stages` (a book per
// additive stage).
struct CodedMatrix {
  const void* codes = nullptr;
  CodeType type = CodeType::U8;
  int64_t rows = 0, positions = 0, stages = 1;
  const float* book = nullptr;
  int64_t books = 1, entries = 0, d = 0;
  bool book_per_position = false;

  int64_t width() const { return positions * d; }
};

// Reads codes, never past the book: a code outside [0, entries) is read as one that exists and remembered.
class Decoder {
 public:
  explicit Decoder(const CodedMatrix& matrix) : m_(matrix), k_(kernels(isa())) {}
  const CodedMatrix& matrix() const { return m_; }
  const Kernels& inner() const { return k_; }

  // out[0, width) = row r, additive stages summed in stage order.
  void row(int64_t r, float* out) const;

  // Asks the processor for the codes of row r.
  void prefetch(int64_t r) const;

  // out[(i * stages + s) * 16 + lane] = where in the books the entry of row r + lane begins, for `count` positions from
  // `position` on; lanes of `rows` and more repeat row r. book_floats: distance of entries, d or that of a padded copy.
  void offsets(int64_t r, int64_t rows, int64_t position, int64_t count, int64_t book_floats, uint32_t* out) const;

  // Kernels::table_rows for `count` positions of all rows; for matrices of one stage and up to kTableEntries entries.
  void table_rows(int64_t position, int64_t count, uint16_t* out, int64_t out_pitch) const;

  // A code read so far that was out of range, or kNone. Ask after the loop: threads only ever set it.
  static constexpr int64_t kNone = INT64_MIN;
  int64_t bad_code() const { return bad_.load(std::memory_order_relaxed); }

 private:
  template <class Code>
  void row_of(int64_t r, float* out) const;
  const void* code_at(int64_t index) const;
  int64_t code(int64_t index) const;
  void find_bad(int64_t r, int64_t rows, int64_t flat, int64_t count) const;

  CodedMatrix m_;
  const Kernels& k_;
  mutable std::atomic<int64_t> bad_{kNone};
};

// Panels of a convolution weight [Co][Ci / groups][R][S] held as codes; decodes 16 rows of codes into
// [tap][channel][16] on every request, so a resident copy of the weight never exists.
class CodedPanels final : public conv::Panels {
 public:
  CodedPanels(const Decoder& decoder, int64_t groups, int64_t channels, int64_t taps);
  const float* panel(int64_t group, int64_t p, float* scratch) const override;
  int64_t scratch_floats() const override;

 private:
  const Decoder& decoder_;
  int64_t group_rows_, channels_, taps_;
};

// A depthwise weight as [tap][rows]: 16 outputs of a panel share no input, so it is decoded whole, once a call.
void decode_depthwise(const Decoder& decoder, int64_t taps, float* out);

}  // namespace effkern::pq
