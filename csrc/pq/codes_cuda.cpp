#include "codes_cuda.h"

namespace effkern::pq {
namespace {

constexpr int64_t kMaxEntries = 65536, kMaxBook = int64_t{1} << 30;  // as on the CPU

}  // namespace

Codes Coded::as_codes(const device::Scope& scope) const {
  return {scope.of<const char>(codes), static_cast<int32_t>(codes.element_size()),
          codes.scalar_type() == ScalarType::Short, static_cast<int32_t>(entries)};
}

Coded coded(const Tensor& codes, const Tensor& book, int64_t columns, const Tensor& x, const char* op) {
  EFFKERN_CHECK_TYPE(codes.scalar_type() == ScalarType::Byte || codes.scalar_type() == ScalarType::Short ||
                         codes.scalar_type() == ScalarType::UInt16 || codes.scalar_type() == ScalarType::Int,
                     op, ": codes must be one of uint8, int16, uint16, int32");
  float_dtype(book, {op, "codebook"});
  device::check_here(book, x, {op, "codebook"});
  device::check_here(codes, x, {op, "codes"});
  EFFKERN_CHECK_VALUE(codes.dim() == 2 || codes.dim() == 3, op, ": codes must be [Co, J] or [Co, J, m], got shape ",
                      shape_text(codes));
  EFFKERN_CHECK_VALUE(book.dim() == 3, op, ": codebook must be [B, K, d], got shape ", shape_text(book));
  const int64_t entries = book.size(1), d = book.size(2);
  EFFKERN_CHECK_VALUE(d >= 1 && entries >= 1 && entries <= kMaxEntries, op, ": codebook must have d >= 1 and K in [1, ",
                      kMaxEntries, "], got K = ", entries, ", d = ", d);
  const int64_t last = codes.size(codes.dim() - 1);
  EFFKERN_CHECK_VALUE(codes.size(1) >= 1 && last >= 1, op,
                      ": codes must have a position and a stage at least, got shape ", shape_text(codes));
  EFFKERN_CHECK_VALUE(book.size(0) == 1 || book.size(0) == last, op, ": codebook must hold 1 book or one per ",
                      codes.dim() == 2 ? "position" : "stage", " (", last, "), got ", book.size(0),
                      " for codes of shape ", shape_text(codes));
  EFFKERN_CHECK_VALUE(d < kMaxBook && entries * book.size(0) <= (kMaxBook - 1) / d, op,
                      ": codebook must hold fewer than ", kMaxBook, " numbers, got shape ", shape_text(book));
  EFFKERN_CHECK_VALUE(
      codes.size(1) < kLimit / d && codes.size(0) < kLimit && (codes.dim() == 2 || codes.size(1) < kLimit / last), op,
      ": codes must be fewer, got shape ", shape_text(codes));
  if (columns >= 0) {
    const int64_t wanted = (columns + d - 1) / d;
    EFFKERN_CHECK_VALUE(codes.size(1) == wanted, op, ": codes must have ceil(", columns, " / ", d, ") = ", wanted,
                        " positions for weight rows of ", columns, " numbers and d = ", d, ", got ", codes.size(1));
  }
  const bool staged = codes.dim() == 3;
  return {.codes = torch::stable::contiguous(codes),
          .book = torch::stable::contiguous(book),
          .rows = codes.size(0),
          .positions = codes.size(1),
          .stages = staged ? codes.size(2) : 1,
          .entries = entries,
          .d = d,
          .book_per_position = !staged && book.size(0) > 1,
          .book_per_stage = staged && book.size(0) > 1};
}

}  // namespace effkern::pq
