// Product-quantized weights: decoding and the products that need none, for any code type, book layout and stage count,
// with codes, books and activations that end at an untouchable page; codes that do not exist are noticed and never
// followed. On every instruction set of the machine.
#include <algorithm>
#include <cmath>
#include <thread>
#include <utility>

#include "../common/parallel.h"
#include "../conv/pack.h"
#include "../pq/choose.h"
#include "../pq/rows.h"
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
    m.d = coin() ? draw(1, 9) : 4 * draw(1, 6);
    m.positions = (columns + m.d - 1) / m.d;
    m.stages = coin() ? 1 : draw(1, 3);
    m.entries = draw(1, m.type == CodeType::U8 ? 256 : 300);
    m.book_per_position = m.stages == 1 && coin();
    m.books = m.book_per_position ? m.positions : m.stages > 1 && coin() ? m.stages : 1;
    return m;
  }

  Coded(int64_t rows, int64_t columns) : Coded(shape(rows, columns)) {}

  explicit Coded(const CodedMatrix& matrix)
      : m(matrix),
        codes(static_cast<size_t>(m.rows * m.positions * m.stages * code_bytes(m.type))),
        book(static_cast<size_t>(m.books * m.entries * m.d) * sizeof(float)) {
    m.codes = codes.data();
    m.book = book.floats();
    for (int64_t i = 0; i < m.books * m.entries * m.d; ++i) book.floats()[i] = normal();
    for (int64_t i = 0; i < m.rows * m.positions * m.stages; ++i) {
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

// Runs the body on every instruction set there is, then goes back to the one in use.
template <class Body>
void on_every_isa(const Body& body) {
  const Isa before = isa();
  for (int i = 0; i < kIsas; ++i) {
    if (!isa_available(static_cast<Isa>(i))) continue;
    set_isa(static_cast<Isa>(i));
    body();
  }
  set_isa(before);
}

// A product of rows: x of any layout and type, a coded matrix, an epilogue, and the exact result to compare with.
struct Product {
  int64_t columns, stride;
  Act act;
  Layout layout;
  DType dtype;
  Buffer x, y;
  Coded coded;
  std::vector<float> scale, shift;
  conv::Problem problem;

  static CodedMatrix matrix(int64_t columns, bool tables) {
    CodedMatrix m = Coded::shape(draw(1, 37), columns);
    if (tables) m.stages = 1, m.entries = std::min<int64_t>(m.entries, pq::kTableEntries);
    if (m.stages == 1 && m.books > 1) m.books = m.positions, m.book_per_position = true;
    return m;
  }

  Product(int64_t n, int64_t h, int64_t w, bool tables)
      : columns(draw(1, 45)),
        stride(draw(1, 2)),
        act(static_cast<Act>(draw(0, 4))),
        layout(static_cast<Layout>(draw(0, 2))),
        dtype(static_cast<DType>(draw(0, 2))),
        x(dtype, layout, n, columns, (h - 1) * stride + 1, (w - 1) * stride + 1, draw(0, 3)),
        y(dtype, layout, n, 0, h, w),
        coded(matrix(columns, tables)) {}

  void run(bool tables, int64_t begin, int64_t end) {
    const pq::Decoder decoder(coded.m);
    tables ? pq::run_lut({problem, begin, end}, decoder) : pq::run_dots({problem, begin, end}, decoder);
    EXPECT(decoder.bad_code() == Decoder::kNone);
  }
};

void check_products(bool tables) {
  for (int trial = 0; trial < 120; ++trial) {
    const int64_t n = draw(1, 3), h = draw(1, 6), w = draw(1, 6);
    Product t(n, h, w, tables);
    const int64_t outputs = t.coded.m.rows;
    Buffer y(t.dtype, t.layout, n, outputs, h, w, draw(0, 2));
    t.x.randomize(t.columns);
    for (int64_t o = 0; o < outputs; ++o) t.scale.push_back(normal()), t.shift.push_back(normal());
    conv::Problem& p = t.problem;
    p.x = t.x.view();
    p.y = y.view();
    p.count = n, p.c_in = t.columns, p.c_out = outputs;
    p.stride[0] = p.stride[1] = t.stride;
    p.epilogue.scale = coin() ? t.scale.data() : nullptr;
    p.epilogue.shift = coin() ? t.shift.data() : nullptr;
    p.epilogue.act = t.act;
    const int64_t begin = draw(0, h * w - 1), end = draw(begin + 1, h * w);
    t.run(tables, begin, end);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t q = 0; q < h * w; ++q)
        for (int64_t o = 0; o < outputs; ++o) {
          const float got = y.at(i, o, q / w, q % w);
          if (q < begin || q >= end) {
            EXPECT(std::isnan(got), "written outside of its pixels, trial ", trial);
            continue;
          }
          double sum = 0, magnitude = 0;
          for (int64_t c = 0; c < t.columns; ++c) {
            const double term =
                static_cast<double>(t.x.at(i, c, q / w * t.stride, q % w * t.stride)) * t.coded.at(o, c);
            sum += term;
            magnitude += std::fabs(term);
          }
          const double factor = p.epilogue.scale != nullptr ? t.scale[o] : 1.0;
          const double addend = p.epilogue.shift != nullptr ? t.shift[o] : 0.0;
          const double exact = activate(sum * factor + addend, t.act);
          const double limit = allowed(exact, magnitude * std::fabs(factor) + std::fabs(addend), t.dtype, t.act);
          EXPECT(std::fabs(got - exact) <= limit, "trial ", trial, ": ", got, " for ", exact);
        }
  }
}

// Two threads that take the indices turn by turn.
void two_threads(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  const auto every_other = [&](int64_t first) {
    for (int64_t i = first; i < end; i += 2) body(i, i + 1);
  };
  std::thread other([&] { every_other(begin + 1); });
  every_other(begin);
  other.join();
}
int64_t two() { return 2; }
int64_t one() { return 1; }
void in_turn(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(begin, end);
}

}  // namespace

TEST(coded_dots_are_within_the_bound) {
  on_every_isa([] { check_products(false); });
}

TEST(coded_tables_are_within_the_bound) {
  on_every_isa([] { check_products(true); });
}

TEST(coded_rows_in_threads_are_the_same_bits_as_alone) {
  for (const bool tables : {false, true}) {
    CodedMatrix m;
    m.rows = 300, m.d = 8, m.positions = 32, m.entries = 100;
    Coded coded(m);
    const Decoder decoder(coded.m);
    constexpr int64_t kRows = 45;
    Buffer x(DType::F32, Layout::Nhwc, kRows, 256, 1, 1), all(DType::F32, Layout::Nhwc, kRows, 300, 1, 1);
    x.randomize(256);
    conv::Problem p;
    p.x = x.view();
    p.y = all.view();
    p.count = kRows, p.c_in = 256, p.c_out = 300;
    const auto run = [&] { tables ? pq::run_lut({p, 0, 1}, decoder) : pq::run_dots({p, 0, 1}, decoder); };
    set_parallel(two_threads, two);
    run();
    set_parallel(in_turn, one);
    for (int64_t r = 0; r < kRows; ++r) {
      Buffer single(DType::F32, Layout::Nhwc, 1, 300, 1, 1);
      p.x.data = static_cast<float*>(x.view().data) + r * x.view().sn;
      p.y = single.view();
      p.count = 1;
      run();
      for (int64_t o = 0; o < 300; ++o) EXPECT(single.at(0, o, 0, 0) == all.at(r, o, 0, 0), "row ", r);
    }
  }
}

TEST(coded_kernels_notice_codes_that_do_not_exist) {
  on_every_isa([] {
    for (int trial = 0; trial < 100; ++trial) {
      CodedMatrix m;
      m.type = static_cast<CodeType>(draw(0, 3));
      m.rows = draw(1, 40), m.positions = draw(1, 70), m.d = 4, m.entries = draw(1, 200);
      Coded coded(m);
      const int64_t at = draw(0, m.rows * m.positions - 1), least = m.entries;
      const int64_t bad = m.type == CodeType::U8 || coin() ? least : m.type == CodeType::U16 ? 65535 : -1;
      set_code(coded.codes.data(), m.type, at, bad);
      const Decoder decoder(coded.m);
      std::vector<uint16_t> rows(static_cast<size_t>(m.rows * 4 * (pq::kTablePositions / 4)));
      if (coin()) {
        const Guarded offsets(static_cast<size_t>(m.positions * pq::kOutputs) * sizeof(uint32_t));
        for (int64_t r = 0; r < m.rows; r += pq::kOutputs) {
          decoder.offsets(r, std::min(pq::kOutputs, m.rows - r), 0, m.positions, m.d,
                          static_cast<uint32_t*>(offsets.data()));
          for (int64_t i = 0; i < m.positions * pq::kOutputs; ++i)
            EXPECT(static_cast<uint32_t*>(offsets.data())[i] < m.entries * m.d);
        }
      } else {
        for (int64_t j = 0; j < m.positions; j += pq::kTablePositions) {
          decoder.table_rows(j, std::min(pq::kTablePositions, m.positions - j), rows.data(), m.rows * 4);
          for (const uint16_t row : rows) EXPECT(row < m.entries * pq::kLanes * 4);
        }
      }
      EXPECT(decoder.bad_code() == bad, static_cast<int>(m.type), " ", bad, " ", decoder.bad_code());
    }
  });
}

TEST(the_choice_ignores_the_number_of_samples) {
  CodedMatrix m;
  m.rows = 2048, m.positions = 64, m.d = 8, m.entries = 256;
  conv::Problem p;
  p.c_in = 512, p.c_out = 2048, p.y.h = p.y.w = 7;
  p.count = p.x.n = 1;
  EXPECT(pq::choose(p, m) == pq::Algo::Lut);
  p.count = p.x.n = 1000;
  EXPECT(pq::choose(p, m) == pq::Algo::Lut);
  p.y.h = p.y.w = 1;
  EXPECT(pq::choose(p, m) == pq::Algo::DecodeFma);
  p.kh = p.kw = 3, p.pad[0] = p.pad[1] = 1;
  EXPECT(pq::choose(p, m) == pq::Algo::Panel);
}

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
  on_every_isa([] {
    for (int trial = 0; trial < 300; ++trial) {
      const int64_t groups = draw(1, 3), out = draw(1, 35), channels = draw(1, 9), taps = draw(1, 9);
      const Coded c(groups * out, channels * taps);
      const Decoder decoder(c.m);
      const pq::CodedPanels panels(decoder, groups, channels, taps);
      EXPECT(panels.scratch_floats() >= taps * panels.tap_stride);
      const Guarded scratch(static_cast<size_t>(panels.scratch_floats()) * sizeof(float));
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t p = 0; p < conv::panels_of(out); ++p) {
          const float* panel = panels.panel(g, p, scratch.floats());
          for (int64_t t = 0; t < taps; ++t)
            for (int64_t i = 0; i < channels; ++i)
              for (int64_t lane = 0; lane < conv::kPanel; ++lane) {
                const int64_t o = p * conv::kPanel + lane;
                const float want = o < out ? c.at(g * out + o, i * taps + t) : 0.0f;
                EXPECT(panel[t * panels.tap_stride + i * conv::kPanel + lane] == want, "trial ", trial);
              }
        }
    }
  });
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
