// The inner loops alone: every row and column tail, every lane count this machine can run, operands that end at an
// untouchable page.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "../conv/ukernel.h"
#include "check.h"
#include "oracle.h"

namespace effkern::test {
namespace {

using conv::Kernels;
constexpr int64_t kPanel = conv::kPanel;

struct Named {
  const char* name;
  const Kernels* kernels;
};

std::vector<Named> runnable() {
  std::vector<Named> all = {{"scalar", &conv::scalar::table}};
  if (isa_available(Isa::Avx2)) {
    all.push_back({"avx2", &conv::avx2::table});
    all.push_back({"avx2, 16 lanes", &conv::avx2::table16});
  }
  if (isa_available(Isa::Avx512)) all.push_back({"avx512", &conv::avx512::table});
  return all;
}

// Rows of `length` floats, each in its own guarded block.
struct Rows {
  std::vector<std::unique_ptr<Guarded>> memory;
  std::vector<const float*> table;
  Rows(int64_t count, int64_t length) {
    for (int64_t i = 0; i < count; ++i) {
      memory.push_back(std::make_unique<Guarded>(static_cast<size_t>(length) * sizeof(float)));
      for (int64_t j = 0; j < length; ++j) memory.back()->floats()[j] = normal();
      table.push_back(memory.back()->floats());
    }
  }
};

bool close(float got, double exact, double magnitude) {
  return std::fabs(got - exact) <= allowed(exact, magnitude, DType::F32, Act::None);
}

void tile(const Named& it, int64_t n, int64_t taps, int64_t k, int64_t offset) {
  const int64_t pitch = it.kernels->rows;
  const Rows a(taps * pitch, offset + k);
  const Guarded b(static_cast<size_t>(taps * k * kPanel) * sizeof(float));
  for (int64_t i = 0; i < taps * k * kPanel; ++i) b.floats()[i] = normal();
  const Guarded c(static_cast<size_t>(n * kPanel) * sizeof(float));
  it.kernels->tile(n, a.table.data(), offset, taps, k, b.floats(), k * kPanel, false, c.floats());
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t o = 0; o < kPanel; ++o) {
      double exact = 0, magnitude = 0;
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t i = 0; i < k; ++i) {
          const double term =
              static_cast<double>(a.table[t * pitch + r][offset + i]) * b.floats()[(t * k + i) * kPanel + o];
          exact += term;
          magnitude += std::fabs(term);
        }
      }
      EXPECT(close(c.floats()[r * kPanel + o], exact, magnitude), it.name, " n ", n, " taps ", taps, " k ", k);
    }
  }
}

// Stores n rows of `cols` channels, `step` elements apart, into the middle of a buffer of 42s and checks every element.
void store(const Named& it, int64_t n, int64_t cols, int64_t step, DType dtype, DType residual_dtype, bool vectors,
           bool residual, Act act) {
  const int64_t row = (cols - 1) * step + 1, rows = n * (row + 5);
  Buffer y(dtype, Layout::Nhwc, 1, rows, 1, 1), add(residual_dtype, Layout::Nhwc, 1, rows, 1, 1);
  y.fill(42.0f);
  add.randomize(rows);
  const Guarded scale(static_cast<size_t>(cols) * sizeof(float)), shift(static_cast<size_t>(cols) * sizeof(float));
  std::vector<float> c(static_cast<size_t>(n * kPanel));
  for (float& v : c) v = 3 * normal();
  for (int64_t i = 0; i < cols; ++i) scale.floats()[i] = normal(), shift.floats()[i] = normal();
  conv::Store s{};
  s.rows = n, s.cols = cols;
  s.y_dtype = dtype, s.residual_dtype = residual_dtype;
  s.y_sc = s.residual_sc = step;
  s.has_residual = residual;
  s.act = act;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t at = (n - 1 - r) * (row + 5) + 5;  // the last row ends with the buffer
    s.y[r] = static_cast<char*>(y.view().data) + at * dtype_size(dtype);
    s.residual[r] = residual ? static_cast<char*>(add.view().data) + at * dtype_size(residual_dtype) : nullptr;
    s.scale[r] = vectors ? scale.floats() : nullptr;
    s.shift[r] = vectors ? shift.floats() : nullptr;
  }
  it.kernels->store(s, c.data());
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t r = n - 1 - i / (row + 5), inside = i % (row + 5) - 5;
    if (inside < 0 || inside % step != 0) {
      EXPECT(y.get(i) == 42.0f, it.name, " wrote outside at ", i);
      continue;
    }
    const int64_t o = inside / step;
    const double acc = c[static_cast<size_t>(r * kPanel + o)], factor = vectors ? scale.floats()[o] : 1.0;
    const double addend = vectors ? shift.floats()[o] : 0.0, extra = residual ? add.get(i) : 0.0;
    const double exact = activate(acc * factor + addend + extra, act);
    const double magnitude = std::fabs(acc * factor) + std::fabs(addend) + std::fabs(extra);
    EXPECT(std::fabs(y.get(i) - exact) <= allowed(exact, magnitude, dtype, act), it.name, " cols ", cols, " act ",
           static_cast<int>(act), " dtype ", static_cast<int>(dtype), " got ", y.get(i), " expected ", exact);
  }
}

// The tile with its store against the sums and the store apart, bit for bit: every number of rows and outputs, sums in
// one part and in two, of rows and outputs that end at an untouchable page.
void gemm(const Named& it, int64_t n, int64_t cols, int64_t taps, int64_t k, bool residual, Act act) {
  const conv::GemmKernels& g = it.kernels->gemm;
  const int64_t panels = conv::panels_of(cols), panel_floats = taps * k * kPanel, cut = draw(0, k);
  const Rows a(taps * g.rows, k);
  const Guarded b(static_cast<size_t>(panels * panel_floats) * sizeof(float));
  for (int64_t i = 0; i < panels * panel_floats; ++i) b.floats()[i] = normal();
  std::vector<float> scale(conv::kMaxCols), shift(conv::kMaxCols), sums(static_cast<size_t>(n * conv::kMaxCols));
  for (float& v : scale) v = normal();
  for (float& v : shift) v = normal();
  const Rows y(n, cols), add(n, cols), exact(n, cols);
  std::vector<void*> to;
  std::vector<const void*> from;
  for (int64_t r = 0; r < n; ++r) to.push_back(y.memory[r]->floats()), from.push_back(add.table[r]);

  conv::GemmTile t{};
  t.rows = n, t.taps = taps;
  t.tap_stride = k * kPanel, t.panel_stride = panel_floats;
  t.sums = sums.data();
  t.cols = cols;
  t.y = to.data();
  t.residual = residual ? from.data() : nullptr;
  t.scale = scale.data(), t.shift = shift.data();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  t.low = act == Act::Relu || act == Act::Relu6 ? 0.0f : -kInfinity;
  t.high = act == Act::Relu6 ? 6.0f : kInfinity;
  t.curved = act == Act::Hardswish || act == Act::Silu;
  t.act = act;
  for (int64_t tap = 0; tap < taps; ++tap)
    for (const bool second : {false, true}) {
      t.taps = 1;
      t.a = a.table.data() + tap * g.rows;
      t.a_offset = second ? cut : 0;
      t.k = second ? k - cut : cut;
      t.b = b.floats() + (tap * k + t.a_offset) * kPanel;
      t.ahead = t.b;
      t.more = tap > 0 || second;
      t.last = tap + 1 == taps && second;
      g.tile(t);
    }

  for (int64_t r = 0; r < n; ++r)
    for (int64_t p = 0; p < panels; ++p) {
      float c[kPanel];
      std::vector<const float*> row(static_cast<size_t>(taps * it.kernels->rows), nullptr);
      for (int64_t tap = 0; tap < taps; ++tap) row[tap * it.kernels->rows] = a.table[tap * g.rows + r];
      it.kernels->tile(1, row.data(), 0, taps, k, b.floats() + p * panel_floats, k * kPanel, false, c);
      conv::Store s{};
      s.rows = 1, s.cols = std::min(kPanel, cols - p * kPanel);
      s.one_table = true;
      s.y_sc = s.residual_sc = 1;
      s.y[0] = exact.memory[r]->floats() + p * kPanel;
      s.has_residual = residual;
      s.residual[0] = add.table[r] + p * kPanel;
      s.scale[0] = scale.data() + p * kPanel, s.shift[0] = shift.data() + p * kPanel;
      s.act = act;
      it.kernels->store(s, c);
    }
  for (int64_t r = 0; r < n; ++r)
    EXPECT(std::memcmp(y.table[r], exact.table[r], static_cast<size_t>(cols) * sizeof(float)) == 0, it.name, " row ", r,
           " of ", n, " cols ", cols, " act ", static_cast<int>(act));
}

}  // namespace

TEST(gemm_tiles_agree_bit_for_bit) {
  for (const Named& it : runnable())
    for (int64_t n = 1; n <= it.kernels->gemm.rows; ++n)
      for (int64_t cols = 1; cols <= it.kernels->gemm.panels * kPanel; ++cols)
        gemm(it, n, cols, 1 + cols % 3, draw(0, 9), coin(), static_cast<Act>((n + cols) % 5));
}

TEST(tile_tails) {
  for (const Named& it : runnable())
    for (int64_t n = 1; n <= it.kernels->rows; ++n)
      for (int64_t k : {0, 1, 2, 7, 33})
        for (int64_t taps : {1, 3, 9}) tile(it, n, taps, k, k % 3);
}

TEST(store_tails) {
  for (const Named& it : runnable())
    for (int64_t cols = 1; cols <= kPanel; ++cols)
      for (DType dtype : {DType::F32, DType::BF16, DType::F16})
        for (int act = 0; act < 5; ++act)
          for (int64_t step : {1, 3})
            store(it, 1 + (cols + act) % it.kernels->rows, cols, step, dtype, coin() ? dtype : DType::F32, coin(),
                  coin(), static_cast<Act>(act));
}

TEST(activations_keep_nan) {
  for (const Named& it : runnable()) {
    for (int act = 0; act < 5; ++act) {
      float c[kPanel], y[kPanel];
      for (float& v : c) v = std::numeric_limits<float>::quiet_NaN();
      conv::Store s{};
      s.rows = 1, s.cols = kPanel, s.y_sc = 1, s.act = static_cast<Act>(act);
      s.y[0] = y;
      it.kernels->store(s, c);
      for (float v : y) EXPECT(std::isnan(v), it.name, " activation ", act);
    }
  }
}

// The rows of a tile are summed in the same order whatever their number: batch invariance rests on this.
TEST(tile_rows_agree_bit_for_bit) {
  for (const Named& it : runnable()) {
    const int64_t pitch = it.kernels->rows, k = 37, taps = 9;
    const Rows a(taps * pitch, k);
    std::vector<float> b(static_cast<size_t>(taps * k * kPanel)), all(static_cast<size_t>(pitch * kPanel)), some(all);
    for (float& v : b) v = normal();
    it.kernels->tile(pitch, a.table.data(), 0, taps, k, b.data(), k * kPanel, false, all.data());
    for (int64_t n = 1; n < pitch; ++n) {
      it.kernels->tile(n, a.table.data(), 0, taps, k, b.data(), k * kPanel, false, some.data());
      EXPECT(std::memcmp(all.data(), some.data(), static_cast<size_t>(n * kPanel) * 4) == 0, it.name, " n ", n);
    }
  }
}

}  // namespace effkern::test
