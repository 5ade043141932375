#include "coded.h"

namespace effkern::pq {
namespace {

constexpr int64_t kMaxEntries = 65536;
constexpr int64_t kMaxBook =
    int64_t{1} << 30;                          // numbers in all books: places in them, and in padded copies, are 32-bit
constexpr int64_t kMaxRow = int64_t{1} << 31;  // numbers in a weight row: places in it are 32-bit

CodeType code_type(const Tensor& codes, const char* op) {
  switch (codes.scalar_type()) {
    case ScalarType::Byte:
      return CodeType::U8;
    case ScalarType::Short:
      return CodeType::I16;
    case ScalarType::UInt16:
      return CodeType::U16;
    case ScalarType::Int:
      return CodeType::I32;
    default:
      fail("TypeError", op, ": codes must be one of uint8, int16, uint16, int32");
  }
}

bool dense(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    if (t.size(i) != 1 && t.stride(i) != expected) return false;
    expected *= t.size(i);
  }
  return true;
}

void read_floats(const Tensor& t, DType dtype, std::vector<float>& out) {
  out.resize(static_cast<size_t>(t.numel()));
  const void* data = t.const_data_ptr();
  const int64_t n1 = t.size(1), n2 = t.size(2);
  for (int64_t i = 0; i < t.size(0); ++i)
    for (int64_t j = 0; j < n1; ++j)
      for (int64_t k = 0; k < n2; ++k)
        out[(i * n1 + j) * n2 + k] = load_float(data, dtype, i * t.stride(0) + j * t.stride(1) + k * t.stride(2));
}

}  // namespace

CodedTensor::CodedTensor(const Tensor& codes, const Tensor& codebook, int64_t columns, const char* op)
    : codes_(codes), codebook_(codebook), decoder_(describe(codes, codebook, columns, op)) {}

CodedMatrix CodedTensor::describe(const Tensor& codes, const Tensor& codebook, int64_t columns, const char* op) {
  CodedMatrix m;
  m.type = code_type(codes, op);
  const DType book_dtype = float_dtype(codebook, {op, "codebook"});
  check_cpu(codes, {op, "codes"});
  check_cpu(codebook, {op, "codebook"});
  EFFKERN_CHECK_VALUE(codes.dim() == 2 || codes.dim() == 3, op, ": codes must be [Co, J] or [Co, J, m], got shape ",
                      shape_text(codes));
  EFFKERN_CHECK_VALUE(codebook.dim() == 3, op, ": codebook must be [B, K, d], got shape ", shape_text(codebook));
  m.rows = codes.size(0);
  m.positions = codes.size(1);
  m.stages = codes.dim() == 3 ? codes.size(2) : 1;
  m.books = codebook.size(0);
  m.entries = codebook.size(1);
  m.d = codebook.size(2);
  m.book_per_position = codes.dim() == 2;
  EFFKERN_CHECK_VALUE(m.d >= 1 && m.entries >= 1 && m.entries <= kMaxEntries, op,
                      ": codebook must have d >= 1 and K in [1, ", kMaxEntries, "], got K = ", m.entries,
                      ", d = ", m.d);
  EFFKERN_CHECK_VALUE(m.positions >= 1 && m.stages >= 1, op,
                      ": codes must have a position and a stage at least, got shape ", shape_text(codes));
  const int64_t last = codes.size(codes.dim() - 1);
  EFFKERN_CHECK_VALUE(m.books == 1 || m.books == last, op, ": codebook must hold 1 book or one per ",
                      m.book_per_position ? "position" : "stage", " (", last, "), got ", m.books,
                      " for codes of shape ", shape_text(codes));
  EFFKERN_CHECK_VALUE(m.entries * m.books <= (kMaxBook - 1) / m.d, op, ": codebook must hold fewer than ", kMaxBook,
                      " numbers, got shape ", shape_text(codebook));
  EFFKERN_CHECK_VALUE(m.positions < kMaxRow / m.d, op, ": codes must be fewer, got shape ", shape_text(codes));
  if (columns >= 0) {
    const int64_t wanted = (columns + m.d - 1) / m.d;
    EFFKERN_CHECK_VALUE(m.positions == wanted, op, ": codes must have ceil(", columns, " / ", m.d, ") = ", wanted,
                        " positions for weight rows of ", columns, " numbers and d = ", m.d, ", got ", m.positions);
  }
  if (!dense(codes)) codes_ = torch::stable::contiguous(codes);
  m.codes = codes_.const_data_ptr();
  if (book_dtype == DType::F32 && dense(codebook)) {
    m.book = static_cast<const float*>(codebook.const_data_ptr());
  } else {
    read_floats(codebook, book_dtype, book_);
    m.book = book_.data();
  }
  return m;
}

void CodedTensor::check_codes(const char* op) const {
  EFFKERN_CHECK_VALUE(decoder_.bad_code() == Decoder::kNone, op, ": codes must lie in [0, ", matrix().entries,
                      ") for a codebook of ", matrix().entries, " entries, got ", decoder_.bad_code());
}

void CodedTensor::check_all_codes(const char* op) const {
  std::vector<float> row(static_cast<size_t>(matrix().width()));
  for (int64_t r = 0; r < matrix().rows; ++r) decoder_.row(r, row.data());
  check_codes(op);
}

}  // namespace effkern::pq
