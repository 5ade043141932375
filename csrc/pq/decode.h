// Weights held as codes: rows of a codebook named by integers, decoded a row or a panel of 16 outputs at a time. Raw
// pointers only.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "../conv/problem.h"

namespace effkern::pq {

enum class CodeType : int { U8, I16, U16, I32 };

// Codes [rows][positions][stages], dense, and the books [books][entries][d] they point into, fp32, dense.
// books is 1, or `positions` where stages == 1 (a book per position), or `stages` (a book per additive stage).
struct CodedMatrix {
  const void* codes = nullptr;
  CodeType type = CodeType::U8;
  int64_t rows = 0, positions = 0, stages = 1;
  const float* book = nullptr;
  int64_t books = 1, entries = 0, d = 0;
  bool book_per_position = false;

  int64_t width() const { return positions * d; }
};

// Reads codes, never past the book: a code outside [0, entries) is taken as 0 and remembered.
class Decoder {
 public:
  explicit Decoder(const CodedMatrix& matrix) : m_(matrix) {}
  const CodedMatrix& matrix() const { return m_; }

  // out[0, width) = row r, additive stages summed in stage order.
  void row(int64_t r, float* out) const;

  // A code read so far that was out of range, or kNone. Ask after the loop: threads only ever set it.
  static constexpr int64_t kNone = INT64_MIN;
  int64_t bad_code() const { return bad_.load(std::memory_order_relaxed); }

  // out[i] = book row of (position, stage) of matrix row r + i, i < count.
  void entries(int64_t r, int64_t count, int64_t position, int64_t stage, const float** out) const;

 private:
  template <class Code>
  void entries_of(int64_t r, int64_t count, int64_t position, int64_t stage, const float** out) const;

  CodedMatrix m_;
  mutable std::atomic<int64_t> bad_{kNone};
};

// Panels of a convolution weight [Co][Ci / groups][R][S] held as codes; decodes 16 rows of codes into
// [tap][channel][16] on every request, so a resident copy of the weight never exists.
class CodedPanels final : public conv::Panels {
 public:
  CodedPanels(const Decoder& decoder, int64_t groups, int64_t channels, int64_t taps);
  const float* panel(int64_t group, int64_t p, float* scratch) const override;
  int64_t scratch_floats() const override { return columns_ * conv::kPanel; }

 private:
  const Decoder& decoder_;
  int64_t group_rows_, columns_;
  std::vector<int32_t> place_;  // column of the weight row, in (channel, tap) order -> tap * channels + channel
  std::vector<float> zeros_;    // stands for the rows past the last output
};

// A depthwise weight as [tap][rows]: 16 outputs of a panel share no input, so it is decoded whole, once a call.
void decode_depthwise(const Decoder& decoder, int64_t taps, float* out);

}  // namespace effkern::pq
