// Decoding of product-quantized weights: any code type, book layout and stage count, with codes and books that end at
// an untouchable page; codes that do not exist are noticed and never followed.
#include <algorithm>
#include <utility>

#include "../conv/pack.h"
#include "../pq/decode.h"
#include "check.h"
#include "oracle.h"

namespace effkern::test {
namespace {

using pq::CodedMatrix;
using pq::CodeType;
using pq::Decoder;

int64_t code_bytes(CodeType type) { return type == CodeType::U8 ? 1 : type == CodeType::I32 ? 4 : 2; }

void set_code(void* codes, CodeType type, int64_t i, int64_t value) {
  if (type == CodeType::U8) static_cast<uint8_t*>(codes)[i] = static_cast<uint8_t>(value);
  if (type == CodeType::I16) static_cast<int16_t*>(codes)[i] = static_cast<int16_t>(value);
  if (type == CodeType::U16) static_cast<uint16_t*>(codes)[i] = static_cast<uint16_t>(value);
  if (type == CodeType::I32) static_cast<int32_t*>(codes)[i] = static_cast<int32_t>(value);
}

// A random matrix of codes over `columns` weights a row, whose last sub-vector may overhang, and what it stands for.
struct Coded {
  CodedMatrix m;
  Guarded codes, book;
  std::vector<int64_t> plain;  // [row][position][stage]

  static CodedMatrix shape(int64_t rows, int64_t columns) {
    CodedMatrix m;
    m.type = static_cast<CodeType>(draw(0, 3));
    m.rows = rows;
    m.d = draw(1, 9);
    m.positions = (columns + m.d - 1) / m.d;
    m.stages = coin() ? 1 : draw(1, 3);
    m.entries = draw(1, m.type == CodeType::U8 ? 256 : 300);
    m.book_per_position = m.stages == 1 && coin();
    m.books = m.book_per_position ? m.positions : m.stages > 1 && coin() ? m.stages : 1;
    return m;
  }

  Coded(int64_t rows, int64_t columns)
      : m(shape(rows, columns)),
        codes(static_cast<size_t>(rows * m.positions * m.stages * code_bytes(m.type))),
        book(static_cast<size_t>(m.books * m.entries * m.d) * sizeof(float)) {
    m.codes = codes.data();
    m.book = book.floats();
    for (int64_t i = 0; i < m.books * m.entries * m.d; ++i) book.floats()[i] = normal();
    for (int64_t i = 0; i < rows * m.positions * m.stages; ++i) {
      plain.push_back(draw(0, m.entries - 1));
      set_code(codes.data(), m.type, i, plain.back());
    }
  }

  // Weight `column` of row r, summed in stage order as the decoder does.
  float at(int64_t r, int64_t column) const {
    const int64_t j = column / m.d, t = column % m.d;
    float sum = 0;
    for (int64_t s = 0; s < m.stages; ++s) {
      const int64_t book_index = m.books == 1 ? 0 : m.book_per_position ? j : s;
      const int64_t code = plain[static_cast<size_t>((r * m.positions + j) * m.stages + s)];
      const float value = book.floats()[(book_index * m.entries + code) * m.d + t];
      sum = s == 0 ? value : sum + value;
    }
    return sum;
  }
};

}  // namespace

TEST(decoded_rows_are_sums_of_entries) {
  for (int trial = 0; trial < 300; ++trial) {
    const Coded c(draw(1, 20), draw(1, 40));
    const Decoder decoder(c.m);
    const Guarded row(static_cast<size_t>(c.m.width()) * sizeof(float));
    for (int64_t r = 0; r < c.m.rows; ++r) {
      decoder.row(r, row.floats());
      for (int64_t i = 0; i < c.m.width(); ++i) EXPECT(row.floats()[i] == c.at(r, i), "trial ", trial);
    }
    EXPECT(decoder.bad_code() == Decoder::kNone);
  }
}

TEST(decoded_panels_are_the_packed_weight) {
  for (int trial = 0; trial < 300; ++trial) {
    const int64_t groups = draw(1, 3), out = draw(1, 35), channels = draw(1, 9), taps = draw(1, 9);
    const Coded c(groups * out, channels * taps);
    const Decoder decoder(c.m);
    const pq::CodedPanels panels(decoder, groups, channels, taps);
    EXPECT(panels.scratch_floats() == channels * taps * conv::kPanel);
    const Guarded scratch(static_cast<size_t>(panels.scratch_floats()) * sizeof(float));
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t p = 0; p < conv::panels_of(out); ++p) {
        const float* panel = panels.panel(g, p, scratch.floats());
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t i = 0; i < channels; ++i)
            for (int64_t lane = 0; lane < conv::kPanel; ++lane) {
              const int64_t o = p * conv::kPanel + lane;
              const float want = o < out ? c.at(g * out + o, i * taps + t) : 0.0f;
              EXPECT(panel[(t * channels + i) * conv::kPanel + lane] == want, "trial ", trial);
            }
      }
  }
}

TEST(decoded_depthwise_weights_are_transposed) {
  for (int trial = 0; trial < 50; ++trial) {
    const int64_t channels = draw(1, 40), taps = draw(1, 9);
    const Coded c(channels, taps);
    const Decoder decoder(c.m);
    const Guarded out(static_cast<size_t>(taps * channels) * sizeof(float));
    pq::decode_depthwise(decoder, taps, out.floats());
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t r = 0; r < channels; ++r) EXPECT(out.floats()[t * channels + r] == c.at(r, t));
  }
}

TEST(a_code_without_an_entry_is_noticed_and_not_followed) {
  const std::pair<CodeType, std::vector<int64_t>> wrong[] = {{CodeType::U8, {7, 255}},
                                                             {CodeType::I16, {7, -1, INT16_MIN, INT16_MAX}},
                                                             {CodeType::U16, {7, 65535}},
                                                             {CodeType::I32, {7, -1, INT32_MIN, INT32_MAX}}};
  for (const auto& [type, values] : wrong) {
    for (const int64_t bad : values) {
      const Guarded codes(static_cast<size_t>(4 * code_bytes(type))), book(7 * 3 * sizeof(float));
      for (int64_t i = 0; i < 4; ++i) set_code(codes.data(), type, i, i == 2 ? bad : 6);
      std::fill(book.floats(), book.floats() + 21, 1.0f);
      CodedMatrix m;
      m.codes = codes.data();
      m.type = type;
      m.rows = 2, m.positions = 2;
      m.book = book.floats();
      m.entries = 7, m.d = 3;
      const Decoder decoder(m);
      float row[6];
      decoder.row(0, row);
      EXPECT(decoder.bad_code() == Decoder::kNone);
      decoder.row(1, row);
      EXPECT(decoder.bad_code() == bad, static_cast<int>(type), " ", bad);
    }
  }
}

}  // namespace effkern::test
