// The gradient of a codebook (csrc/pq/book_grad.cuh): books for all, by position and by stage, entries of one number to
// more than a block holds, padding, rows named twice and never, every schedule; against sums in double.
#include <cmath>
#include <random>

#include "../../pq/book_grad.cuh"
#include "../check.h"
#include "array.h"
#include "launch.h"
#include "traffic.h"

namespace effkern::test::simt {
namespace {

using namespace pq;
using device::BF16;
using device::F16;

struct Coding {
  int rows = 50, positions = 4, stages = 1, d = 8, entries = 20;
  bool by_position = false, by_stage = false;
  int columns = 0;  // 0: all
  int coded = 0;    // rows that others are picked from, by lists; 0: none are
  bool factors = true;
  int width = 0, chunk = 0, slice = 16;  // 0: as planned
};

template <class T>
void book_holds(const Coding& c, int seeds = kSchedules) {
  std::mt19937 rng(3);
  const auto number = [&] { return static_cast<float>(static_cast<int>(rng() % 17) - 8) / 4; };
  const int columns = c.columns != 0 ? c.columns : c.positions * c.d, pitch = columns + 3;
  const int coded = c.coded != 0 ? c.coded : c.rows, values = c.coded != 0 ? 7 : c.rows;
  const int books = c.by_position ? c.positions : c.by_stage ? c.stages : 1;
  Array<T> of_values("values", int64_t{1} * values * pitch);
  Array<uint8_t> codes("codes", int64_t{1} * coded * c.positions * c.stages);
  Array<float> scale("scale", coded), weights("weights", c.rows), book("book", int64_t{1} * books * c.entries * c.d);
  Array<int32_t> picked("picked", 2 * c.rows);  // words of int64
  Array<int32_t> bags("bags", c.rows);
  for (int i = 0; i < values; ++i)
    for (int k = 0; k < columns; ++k) of_values.put(int64_t{1} * i * pitch + k, device::from_float<T>(number()));
  for (int i = 0; i < coded * c.positions * c.stages; ++i)  // some are held to the last entry
    codes.put(i, static_cast<uint8_t>(rng() % static_cast<uint32_t>(c.entries + 2)));
  for (int i = 0; i < coded; ++i) scale.put(i, number());
  for (int i = 0; i < c.rows; ++i) {
    weights.put(i, number()), bags.put(i, static_cast<int32_t>(i * 7 / c.rows));
    picked.put(2 * i, static_cast<int32_t>(rng() % static_cast<uint32_t>(coded))), picked.put(2 * i + 1, 0);
  }
  for (int i = 0; i < books * c.entries * c.d; ++i) book.put(i, number());
  BookGrad<T> p{};
  p.of.codes = {codes.global().template as<const char>(), 1, false, c.entries};
  p.of.coded = coded, p.of.positions = c.positions, p.of.stages = c.stages, p.of.d = c.d;
  p.of.book_per_position = c.by_position, p.of.book_per_stage = c.by_stage;
  p.of.rows = c.rows, p.of.value_rows = values, p.of.padding = c.coded != 0 ? 2 : -1;
  if (c.coded != 0) {
    p.of.picked = {picked.global(), 2, true};
    p.of.bags = {bags.global(), 1, false};
  }
  p.of.values = of_values.global(), p.of.pitch = pitch, p.of.columns = columns;
  if (c.factors) p.of.scale = scale.global(), p.of.weights = weights.global();
  set_slices(p);
  if (c.width != 0) p.width = c.width;
  if (c.chunk != 0) p.chunk = c.chunk;
  p.slice = c.slice, p.slices = (c.rows + c.slice - 1) / c.slice;
  EXPECT(p.books == books);
  const int64_t size = int64_t{1} * books * c.entries * c.d;
  Array<float> parts("parts", size * p.slices), by_scale("by_scale", c.rows), by_weight("by_weight", c.rows);
  for (int64_t i = 0; i < size * p.slices; ++i) parts.output(i);
  for (int i = 0; i < c.rows; ++i) by_scale.output(i), by_weight.output(i);
  p.parts = parts.global();
  const auto name = [&](int i) { return c.coded != 0 ? picked.get(2 * i) : i; };
  const auto value = [&](int i, int column) -> double {
    const int row = c.coded != 0 ? bags.get(i) : i;
    return column < columns ? device::to_float(of_values.get(int64_t{1} * row * pitch + column)) : 0;
  };
  const auto code = [&](int i, int position, int stage) {
    return std::min<int>(codes.get((int64_t{1} * name(i) * c.positions + position) * c.stages + stage), c.entries - 1);
  };
  const auto book_of = [&](int position, int stage) { return c.by_position ? position : c.by_stage ? stage : 0; };
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    parts.poison(), by_scale.poison(), by_weight.poison();
    const int per = (p.chunk + kBookGradWarps - 1) / kBookGradWarps;
    const Launch launch{.grid = static_cast<unsigned>(book_tables(p) * books * p.slices),
                        .threads = kBookGradThreads,
                        .shared = static_cast<size_t>(per * kBookGradWarps * p.width * 4),
                        .seed = seed,
                        .resident = seed % 5 == 4 ? 2 : 1,
                        .granule = 4,
                        .counters = seed == 0};
    ++schedules_run();
    Report report = run(launch, [&] { book_grad<T>(p); });
    EXPECT(report.ok(), report.what);
    const auto costs = [&](const BookWork& work) {
      EXPECT(report.cost[Op::LoadGlobal].asked == work.bytes_read, report.cost[Op::LoadGlobal].asked,
             " bytes read, model ", work.bytes_read);
      EXPECT(report.cost[Op::StoreGlobal].asked == work.bytes_written, report.cost[Op::StoreGlobal].asked, " written");
    };
    int64_t kept = 0;
    for (int i = 0; i < c.rows; ++i) kept += name(i) != p.of.padding;
    if (launch.counters) costs(book_grad_work(p, kept));
    std::vector<double> want(static_cast<size_t>(size * p.slices)), most = want;
    for (int i = 0; i < c.rows; ++i) {
      if (name(i) == p.of.padding) continue;
      const double factor = c.factors ? double{scale.get(name(i))} * weights.get(i) : 1;
      for (int position = 0; position < c.positions; ++position)
        for (int stage = 0; stage < c.stages; ++stage)
          for (int e = 0; e < c.d; ++e) {
            const int64_t at = i / c.slice * size +
                               (int64_t{1} * book_of(position, stage) * c.entries + code(i, position, stage)) * c.d + e;
            const double term = factor * value(i, position * c.d + e);
            want[static_cast<size_t>(at)] += term, most[static_cast<size_t>(at)] += std::fabs(term);
          }
    }
    for (int64_t i = 0; i < size * p.slices; ++i)
      EXPECT(parts.stores(i) == 1 &&
                 std::fabs(parts.get(i) - want[static_cast<size_t>(i)]) <= 0x1p-19 * most[static_cast<size_t>(i)],
             "part ", i, " is ", parts.get(i), " after ", parts.stores(i), " stores, not ",
             want[static_cast<size_t>(i)]);

    const RowDots<T> dots{p.of, book.global(), by_scale.global(), by_weight.global()};
    const Launch second{.grid = 2, .threads = kRowDotsThreads, .seed = seed, .granule = 2, .counters = seed == 0};
    ++schedules_run();
    report = run(second, [&] { row_dots<T>(dots); });
    EXPECT(report.ok(), report.what);
    if (second.counters) costs(row_dots_work(dots, kept));
    for (int i = 0; i < c.rows; ++i) {
      double dot = 0, size_of = 0;
      for (int column = 0; name(i) != p.of.padding && column < columns; ++column)
        for (int stage = 0; stage < c.stages; ++stage) {
          const int position = column / c.d;
          const int64_t entry = int64_t{1} * book_of(position, stage) * c.entries + code(i, position, stage);
          const double term = value(i, column) * book.get(entry * c.d + column % c.d);
          dot += term, size_of += std::fabs(term);
        }
      const double weight = c.factors ? weights.get(i) : 1, factor = c.factors ? scale.get(name(i)) : 1;
      const double bound = 0x1p-18 * size_of * (std::fabs(weight) + std::fabs(factor));
      EXPECT(by_scale.stores(i) == 1 && std::fabs(by_scale.get(i) - dot * weight) <= bound, "by_scale ", i);
      EXPECT(by_weight.stores(i) == 1 && std::fabs(by_weight.get(i) - dot * factor) <= bound, "by_weight ", i);
    }
  }
}

}  // namespace

TEST(book_grad_gpu) {
  book_holds<float>({});
  book_holds<float>({.rows = 33, .positions = 5, .d = 9, .entries = 70, .columns = 41, .factors = false}, 4);
  book_holds<BF16>({.rows = 40, .positions = 3, .stages = 2, .d = 4, .entries = 9, .by_stage = true}, 4);
  book_holds<F16>({.positions = 3, .d = 5, .entries = 6, .by_position = true, .coded = 11, .slice = 20}, 4);
  book_holds<float>(
      {.rows = 20, .positions = 2, .stages = 3, .d = 70, .entries = 5, .columns = 130, .width = 40, .chunk = 3}, 4);
  book_holds<float>({.rows = 300, .positions = 1, .d = 1, .entries = 40, .factors = false, .chunk = 30, .slice = 300},
                    3);
  book_holds<F16>({.rows = 9, .positions = 1, .d = 33, .entries = 1, .coded = 4}, 3);
}

TEST(book_fold_gpu) {
  Array<float> parts("parts", 3 * 600);
  Array<BF16> to("to", 600);
  for (int i = 0; i < 3 * 600; ++i)
    parts.put(i, static_cast<float>(i % 9 - 4) + (i < 600 ? 0.5f : i < 1200 ? 0x1p24f : -0x1p24f));
  for (int i = 0; i < 600; ++i) to.output(i);
  const BookFold<BF16> p{parts.global(), to.global(), 600, 3};
  for (uint32_t seed = 0; seed < kSchedules; ++seed) {
    to.poison();
    const Launch launch{.grid = 2, .threads = kBookFoldThreads, .seed = seed, .granule = 2, .counters = seed == 0};
    ++schedules_run();
    Report report = run(launch, [&] { book_fold(p); });
    EXPECT(report.ok(), report.what);
    for (int i = 0; i < 600; ++i) {
      const double sum = double{parts.get(i)} + parts.get(600 + i) + parts.get(1200 + i);
      EXPECT(to.stores(i) == 1 &&
                 device::to_float(to.get(i)) == device::to_float(device::from_float<BF16>(static_cast<float>(sum))),
             "element ", i);
    }
    const BookWork work = book_fold_work(p);
    if (launch.counters) expect_traffic(report, {work.bytes_read, work.bytes_written}, "book_fold");
  }
}

TEST(book_plan_gpu) {
  BookGrad<float> p{};
  p.of.codes.entries = 256, p.of.d = 8, p.of.positions = 512, p.of.stages = 1, p.of.rows = 4096;
  set_slices(p);
  EXPECT(p.slices * int64_t{p.slice} >= p.of.rows && p.slices >= 200 && book_tables(p) == 1);
  p.of.codes.entries = 65536, p.of.rows = 0, p.of.d = 300;
  set_slices(p);
  EXPECT(p.slices == 1 && int64_t{p.chunk} * p.width <= kBookGradFloats);
}

}  // namespace effkern::test::simt
