// Coded matrices times few rows, against sums in double: chunks of both sizes, codes of both, tails of outputs, rows,
// positions and lanes, codes out of range, every schedule; bits that do not depend on the number of rows; bytes as the
// model says, and no conflict of banks where x is read.
#include "../../pq/dots.cuh"
#include "../../pq/dots_mma.cuh"
#include "conv_case.h"

namespace effkern::test::simt {
namespace {

struct Product {
  int rows = 3, outputs = 21, positions = 32, d = 8, entries = 16, code_bytes = 1;
  bool has_sign = false, scale = true, bias = true, wild = false;
  bool infinite = false;  // the first entry, which no code names
  int extra = 0;          // numbers between rows of x
  Act act = Act::None;
  unsigned grid = 2;
};

constexpr int kRowsOfX = 80;

// kForm: rows at most in fp32, tiles of outputs in 16 bits; kEights: of rows, there.
template <class T, int kPer, int kForm, int kEights = 1>
std::vector<float> multiplies(const Product& c, int seeds = 2, int only = -1) {
  std::mt19937 rng(7);
  const auto draw = [&](int below) { return static_cast<int>(rng() % static_cast<uint32_t>(below)); };
  const int count = c.outputs * c.positions, width = c.positions * c.d, x_row = width + c.extra;
  const size_t bytes = static_cast<size_t>(c.code_bytes);
  Memory codes("codes", static_cast<size_t>(count) * bytes, kReadable | kDefined, bytes);
  Array<T> book("book", int64_t{1} * c.entries * c.d), x("x", int64_t{1} * kRowsOfX * x_row),
      y("y", int64_t{1} * c.rows * c.outputs);
  Array<float> scale("scale", c.outputs), bias("bias", c.outputs);
  std::vector<int> number(static_cast<size_t>(count));
  const int most = c.code_bytes == 1 ? 256 : 65536;
  for (int& n : number)
    n = c.infinite ? 1 + draw(c.entries - 1) : c.wild && draw(3) == 0 ? draw(most) : draw(c.entries);
  for (size_t i = 0; i < number.size(); ++i) std::memcpy(codes.data() + i * bytes, &number[i], bytes);
  const auto real = [&] { return static_cast<float>(draw(2001) - 1000) / 512.0f; };
  for (int i = 0; i < c.entries * c.d; ++i)
    book.put(i, device::from_float<T>(c.infinite && i < c.d ? INFINITY : real()));
  for (int i = 0; i < c.outputs; ++i) scale.put(i, real()), bias.put(i, real());
  std::vector<T> numbers(static_cast<size_t>(kRowsOfX * width));
  for (T& v : numbers) v = device::from_float<T>(real());
  const int from = only < 0 ? 0 : only;  // this row of x, as if it were the first
  for (int r = 0; r < c.rows; ++r)
    for (int k = 0; k < width; ++k)
      x.put(int64_t{1} * r * x_row + k, numbers[static_cast<size_t>((from + r) * width + k)]);
  for (int64_t i = 0; i < int64_t{1} * c.rows * c.outputs; ++i) y.output(i);

  pq::Dots<T> p{};
  p.codes = {{codes.data(), &codes}, c.code_bytes, c.has_sign, c.entries};
  p.book = book.global(), p.x = x.global(), p.x_row = x_row, p.y = y.global(), p.act = c.act;
  if (c.scale) p.scale = scale.global();
  if (c.bias) p.bias = bias.global();
  p.rows = c.rows, p.outputs = c.outputs, p.positions = c.positions, p.d = c.d;
  EXPECT(pq::plan(p) && pq::detail::chunk_bytes(p) == kPer * static_cast<int>(sizeof(T)));
  constexpr bool kMma = sizeof(T) == 2;
  if (kMma) p.tiles = kForm, p.eights = kEights;
  const int32_t items = static_cast<int32_t>(pq::dots_items(p)), at_once = pq::kDotsRows * kEights;
  const int32_t groups = items / ((c.rows + at_once - 1) / at_once);

  std::vector<float> got;
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    y.poison();
    Launch launch{.grid = c.grid, .threads = pq::kDotsThreads, .seed = seed, .counters = seed == 0};
    if constexpr (kMma)
      launch.threads = pq::kMmaThreads, launch.shared = static_cast<size_t>(pq::mma_shared(p));
    else
      launch.shared = static_cast<size_t>(pq::shared_of(p));
    Report report = run(launch, [&] {
      if constexpr (kMma)
        pq::dots_mma<T, kPer, kForm, kEights>(p, groups, items);
      else
        pq::dots<T, kPer, kForm>(p, groups, items);
    });
    EXPECT(report.ok(), report.what);
    if (!report.ok()) return {};
    if (seed == 0) {
      const pq::DotsWork work = pq::dots_work(p, c.grid);
      const int64_t vectors = int64_t{4} * c.outputs * (kMma ? c.rows : items / groups) * (c.scale + c.bias);
      EXPECT(report.cost[Op::StoreGlobal].bytes == work.bytes_y);
      EXPECT(report.cost[Op::LoadGlobal].asked == work.bytes_codes + work.bytes_book + work.bytes_x + vectors,
             "loaded ", report.cost[Op::LoadGlobal].asked, ", not ",
             work.bytes_codes + work.bytes_book + work.bytes_x + vectors);
      const Cost& shared = report.cost[Op::LoadShared];
      // Enough copies of the book, and no lane without codes; sums read a row of 32 at a time.
      const bool whole = kMma ? kForm == 2 : c.positions % (p.lanes * 16 / c.code_bytes) == 0;
      if (p.copies * kPer * static_cast<int>(sizeof(T)) == 128 && whole) {
        const Cost& stores = report.cost[Op::StoreShared];
        EXPECT(shared.passes == shared.least, shared.passes, " passes for ", shared.least);
        EXPECT(!kMma || stores.passes == stores.least, stores.passes, " passes for ", stores.least);
      }
    }
    got.assign(static_cast<size_t>(c.rows * c.outputs), 0);
    for (int r = 0; r < c.rows; ++r)
      for (int o = 0; o < c.outputs; ++o) {
        double sum = 0, size = 0;
        for (int k = 0; k < width; ++k) {
          int code = number[static_cast<size_t>(o * c.positions + k / c.d)];
          if (c.has_sign && code >= 0x8000) code = 0;
          code = std::min(code, c.entries - 1);
          const double term = double{device::to_float(x.get(int64_t{1} * r * x_row + k))} *
                              device::to_float(book.get(int64_t{1} * code * c.d + k % c.d));
          sum += term, size += std::fabs(term);
        }
        const double factor = c.scale ? scale.get(o) : 1.0, shift = c.bias ? bias.get(o) : 0.0;
        double want = sum * factor + shift;
        if (c.act == Act::Relu) want = std::max(want, 0.0);
        const double u = 0x1p-24, last = sizeof(T) == 4 ? u : std::is_same_v<T, device::BF16> ? 0x1p-8 : 0x1p-11;
        const double bound = (width / 4.0 + 8) * u * (size * std::fabs(factor) + std::fabs(shift)) +
                             2 * last * std::fabs(want) + 0x1p-24;
        const int64_t at = int64_t{1} * r * c.outputs + o;
        got[static_cast<size_t>(at)] = device::to_float(y.get(at));
        EXPECT(std::fabs(got[static_cast<size_t>(at)] - want) <= bound && y.stores(at) == 1, "row ", r, " output ", o,
               " seed ", seed, ": ", got[static_cast<size_t>(at)], " for ", want);
      }
  }
  return got;
}

}  // namespace

TEST(dots_gpu_rows) {
  multiplies<float, 4, 8>({}, kSchedules);
  multiplies<float, 4, 1>({.rows = 1, .entries = 256, .wild = true, .act = Act::Relu}, kSchedules);
  multiplies<float, 4, 8>({.rows = 8, .outputs = 5, .positions = 48, .d = 4, .scale = false});
  multiplies<float, 4, 8>({.rows = 11, .outputs = 40, .positions = 16, .d = 16, .bias = false, .grid = 3});
}

TEST(dots_gpu_segments_and_tails) {
  multiplies<float, 4, 1>({.rows = 1, .outputs = 9, .positions = 1000, .grid = 1}, kSchedules);
  multiplies<float, 4, 8>({.rows = 2, .outputs = 3, .positions = 301, .extra = 8}, kSchedules);
  multiplies<float, 4, 1>({.rows = 1, .outputs = 1, .positions = 1, .grid = 1});
  multiplies<float, 4, 8>({.rows = 9, .outputs = 70, .positions = 33, .d = 8, .extra = 1});  // x not in chunks
}

TEST(dots_gpu_short_entries_and_wide_codes) {
  multiplies<float, 4, 8>({.positions = 40, .d = 4, .entries = 300, .code_bytes = 2, .wild = true}, kSchedules);
  multiplies<float, 4, 1>({.rows = 1, .positions = 9, .d = 12, .code_bytes = 2, .has_sign = true, .wild = true});
  multiplies<float, 4, 8>({.rows = 2, .positions = 24, .d = 4, .entries = 1000, .code_bytes = 2, .wild = true});
}

TEST(dots_gpu_a_row_does_not_depend_on_the_others) {
  const Product all{.rows = 13, .outputs = 18, .positions = 80};
  const std::vector<float> together = multiplies<float, 4, 8>(all, 1);
  for (int row : {0, 7, 12}) {
    Product one = all;
    one.rows = 1;
    const std::vector<float> alone = multiplies<float, 4, 1>(one, 1, row);
    EXPECT(std::equal(alone.begin(), alone.end(), together.begin() + row * all.outputs), "row ", row);
  }
}

TEST(dots_mma_gpu_rows) {
  multiplies<device::F16, 8, 1>({}, kSchedules);
  multiplies<device::F16, 8, 2>({.rows = 1, .entries = 256, .wild = true, .act = Act::Relu}, kSchedules);
  multiplies<device::BF16, 8, 2>({.rows = 11, .outputs = 40, .positions = 16, .d = 16, .bias = false, .grid = 3});
  multiplies<device::F16, 8, 1>({.rows = 16, .outputs = 33, .positions = 64, .scale = false, .grid = 1});
}

TEST(dots_mma_gpu_segments_and_tails) {
  multiplies<device::F16, 8, 2>({.rows = 2, .outputs = 3, .positions = 301, .extra = 8}, kSchedules);
  multiplies<device::F16, 8, 1>({.rows = 3, .outputs = 20, .positions = 272, .d = 16, .grid = 1}, kSchedules);
  multiplies<device::F16, 8, 1>({.rows = 1, .outputs = 1, .positions = 1, .grid = 1});
  multiplies<device::BF16, 8, 2>({.rows = 9, .outputs = 70, .positions = 33, .d = 8, .extra = 1});  // x not in chunks
  multiplies<device::F16, 8, 1>({.positions = 21, .infinite = true});
}

TEST(dots_mma_gpu_short_entries_and_wide_codes) {
  multiplies<device::F16, 4, 1>({.positions = 40, .d = 4, .entries = 300, .code_bytes = 2, .wild = true}, kSchedules);
  multiplies<device::BF16, 4, 2>({.rows = 1, .positions = 9, .d = 12, .code_bytes = 2, .has_sign = true, .wild = true});
  multiplies<device::F16, 4, 2>({.rows = 8, .positions = 160, .d = 4, .entries = 1000, .code_bytes = 2, .grid = 1});
  multiplies<device::F16, 4, 1>({.rows = 1, .positions = 17, .d = 4, .entries = 5, .wild = true});
}

TEST(dots_mma_gpu_many_rows) {
  multiplies<device::F16, 8, 2, 4>({.rows = 32, .outputs = 33}, kSchedules);
  multiplies<device::F16, 8, 2, 4>({.rows = 9,
                                    .outputs = 5,
                                    .positions = 300,
                                    .entries = 256,
                                    .wild = true,
                                    .extra = 8,
                                    .act = Act::Relu,
                                    .grid = 1});
  multiplies<device::BF16, 8, 2, 4>({.rows = 75, .outputs = 40, .positions = 144, .d = 16, .bias = false, .grid = 3});
  multiplies<device::F16, 8, 2, 4>({.rows = 17, .outputs = 20, .positions = 33, .extra = 1});  // x not in chunks
  multiplies<device::F16, 8, 2, 4>({.rows = 33, .positions = 21, .infinite = true});
  multiplies<device::F16, 4, 2, 4>(
      {.rows = 40, .positions = 160, .d = 4, .entries = 1000, .code_bytes = 2, .wild = true}, kSchedules);
  multiplies<device::BF16, 4, 2, 4>(
      {.rows = 12, .positions = 9, .d = 12, .code_bytes = 2, .has_sign = true, .wild = true});
  multiplies<device::F16, 4, 2, 4>({.rows = 24, .positions = 17, .d = 4, .entries = 5, .scale = false, .wild = true});
}

TEST(dots_mma_gpu_a_row_does_not_depend_on_the_others) {
  const Product all{.rows = 13, .outputs = 18, .positions = 80};
  const std::vector<float> together = multiplies<device::F16, 8, 2>(all, 1);
  for (int row : {0, 7, 12}) {
    Product one = all;
    one.rows = 1;
    const std::vector<float> alone = multiplies<device::F16, 8, 1>(one, 1, row);
    EXPECT(std::equal(alone.begin(), alone.end(), together.begin() + row * all.outputs), "row ", row);
  }
  Product many = all;
  many.rows = 70;
  const std::vector<float> all_at_once = multiplies<device::F16, 8, 2, 4>(many, 1);
  EXPECT(std::equal(together.begin(), together.end(), all_at_once.begin()));
  for (int row : {13, 31, 32, 69}) {
    Product one = all;
    one.rows = 1;
    const std::vector<float> alone = multiplies<device::F16, 8, 1>(one, 1, row);
    EXPECT(std::equal(alone.begin(), alone.end(), all_at_once.begin() + row * all.outputs), "row ", row);
  }
}

}  // namespace effkern::test::simt
