// The gradient through a ragged epilogue (csrc/sliced_conv/ragged_grad.cuh): widths from none to all, tables, every
// activation, no access past a sample's channels, every schedule; and the sums of tables.
#include <cmath>
#include <random>

#include "../../sliced_conv/ragged_grad.cuh"
#include "../check.h"
#include "activation.h"
#include "array.h"
#include "launch.h"
#include "traffic.h"

namespace effkern::test::simt {
namespace {

using namespace sliced_conv;
using device::BF16;
using device::F16;

struct Epilogue {
  int pixels = 37, channels = 20, piece = 16;
  std::vector<int> widths = {20, 0, 7, 20, 13};
  Act act = Act::Relu;
  int tables = 0;
  bool with_gz = true, with_scale = true, by_scale = false;
  int extra = 0;
};

template <class T>
void epilogue_holds(const Epilogue& c, int seeds = kSchedules) {
  std::mt19937 rng(9);
  const auto real = [&] { return static_cast<float>(static_cast<int>(rng() % 65) - 32) / 4; };
  const int samples = static_cast<int>(c.widths.size()), pitch = c.channels + c.extra;
  const int pieces = (c.pixels + c.piece - 1) / c.piece, groups = device::column_groups<T>(c.channels);
  const int64_t size = int64_t{1} * samples * c.pixels * pitch, parts = int64_t{1} * samples * pieces * c.channels;
  Array<T> gy("gy", size), y("y", size), z("z", size), gz("gz", size);
  Array<float> scale("scale", std::max(1, c.tables * c.channels)), shift("shift", std::max(1, c.tables * c.channels));
  Array<float> by_shift("by_shift", parts), by_scale("by_scale", parts), by_bias("by_bias", parts);
  Array<int32_t> widths("widths", samples), rows("rows", samples);
  int64_t active = 0;
  for (int i = 0; i < c.tables * c.channels; ++i) scale.put(i, real()), shift.put(i, real());
  for (int n = 0; n < samples; ++n) {
    widths.put(n, c.widths[static_cast<size_t>(n)]);
    if (c.tables > 0) rows.put(n, n % c.tables);
    const int own = std::min(c.widths[static_cast<size_t>(n)], c.channels);
    active += own;
    for (int i = n * c.pixels; i < (n + 1) * c.pixels; ++i)
      for (int k = 0; k < own; ++k) {
        const int64_t at = int64_t{1} * i * pitch + k;
        gy.put(at, device::from_float<T>(real())), y.put(at, device::from_float<T>(real()));
        z.put(at, device::from_float<T>(real())), gz.output(at);
      }
  }
  for (int64_t i = 0; i < parts; ++i) by_shift.output(i), by_scale.output(i), by_bias.output(i);
  RaggedGrad<T> p{};
  p.gy = {gy.global(), pitch}, p.y = {y.global(), pitch}, p.z = {z.global(), pitch};
  if (c.with_gz) p.gz = {gz.global(), pitch};
  p.c_out = {widths.global(), 1, false};
  if (c.tables > 0) {
    p.shift = shift.global(), p.table_row = rows.global(), p.table_stride = c.channels;
    if (c.with_scale) p.scale = scale.global();
  }
  p.by_shift = by_shift.global(), p.by_bias = by_bias.global();
  if (c.by_scale) p.by_scale = by_scale.global();
  p.samples = samples, p.pixels = c.pixels, p.channels = c.channels, p.pieces = pieces, p.piece = c.piece;
  p.act = c.act, p.wide = pitch % device::kPerChunk<T> == 0;
  const bool clips = c.act == Act::Relu || c.act == Act::Relu6;
  const double u = sizeof(T) == 4 ? 0x1p-21 : std::is_same_v<T, F16> ? 0x1p-10 : 0x1p-7;
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    gz.poison(), by_shift.poison(), by_scale.poison(), by_bias.poison();
    const Launch launch{.grid = static_cast<unsigned>(samples * pieces * groups),
                        .threads = device::kColumnThreads,
                        .shared = device::kColumnShared,
                        .seed = seed,
                        .resident = seed % 5 == 4 ? 2 : 1,
                        .granule = sizeof(T),
                        .counters = seed == 0};
    ++schedules_run();
    Report report = run(launch, [&] { ragged_grad<T>(p); });
    EXPECT(report.ok(), report.what);
    if (launch.counters && c.tables == 0) {
      const RaggedGradWork work = ragged_grad_work(p, active);
      EXPECT(report.cost[Op::LoadGlobal].asked == work.bytes_read, report.cost[Op::LoadGlobal].asked, " bytes read");
      EXPECT(report.cost[Op::StoreGlobal].asked == work.bytes_written, report.cost[Op::StoreGlobal].asked, " written");
    }
    for (int n = 0; n < samples; ++n)
      for (int k = 0; k < c.channels; ++k)
        for (int part = 0; part < pieces; ++part) {
          const int64_t table = c.tables > 0 ? int64_t{1} * (n % c.tables) * c.channels + k : -1;
          const double factor = table >= 0 && c.with_scale ? scale.get(table) : 1;
          const double addend = table >= 0 ? shift.get(table) : 0;
          double of_shift = 0, of_scale = 0, most = 0;
          for (int i = part * c.piece; i < std::min(c.pixels, (part + 1) * c.piece); ++i) {
            if (k >= c.widths[static_cast<size_t>(n)]) continue;
            const int64_t at = (int64_t{1} * n * c.pixels + i) * pitch + k;
            const double sum = device::to_float(z.get(at));
            const double seen = clips ? device::to_float(y.get(at)) : sum * factor + addend;
            const double g = device::to_float(gy.get(at)) * slope(seen, c.act);
            of_shift += g, of_scale += g * sum, most += std::fabs(g) * (1 + std::fabs(sum));
            if (c.with_gz)
              EXPECT(gz.stores(at) == 1 && std::fabs(device::to_float(gz.get(at)) - g * factor) <=
                                               u * (1 + std::fabs(seen)) * std::fabs(factor) * 4,
                     "gz of sample ", n, " channel ", k);
          }
          const int64_t at = (int64_t{1} * n * pieces + part) * c.channels + k;
          const double bound = 0x1p-17 * (most + of_shift * of_shift);
          EXPECT(by_shift.stores(at) == 1 && std::fabs(by_shift.get(at) - of_shift) <= bound, "shift ", n, " ", k);
          EXPECT(by_bias.stores(at) == 1 &&
                     std::fabs(by_bias.get(at) - of_shift * factor) <= bound * (1 + std::fabs(factor)),
                 "bias ", n, " ", k);
          if (c.by_scale)
            EXPECT(by_scale.stores(at) == 1 && std::fabs(by_scale.get(at) - of_scale) <= bound, "scale ", n, " ", k);
        }
  }
}

}  // namespace

TEST(ragged_grad_gpu) {
  epilogue_holds<F16>({});
  epilogue_holds<BF16>({.channels = 70, .widths = {70, 65, 64, 1, 99}, .act = Act::Relu6, .extra = 2});
  epilogue_holds<float>({.act = Act::Hardswish, .tables = 2, .by_scale = true});
  epilogue_holds<float>(
      {.channels = 33, .widths = {33, 5}, .act = Act::Silu, .tables = 3, .by_scale = true, .extra = 3}, 3);
  epilogue_holds<F16>({.act = Act::Relu, .tables = 2, .by_scale = true, .extra = 4}, 3);
  epilogue_holds<float>({.act = Act::None, .tables = 2, .with_gz = false, .with_scale = false}, 2);
}

TEST(fold_table_gpu) {
  constexpr int samples = 9, pieces = 2, channels = 40, rows = 4, columns = 70;
  Array<float> sums("sums", samples * pieces * channels), to("to", rows * columns);
  Array<int32_t> row("row", samples);
  const int of[samples] = {1, 0, 1, 3, 0, 0, 1, 3, 0};
  std::mt19937 rng(4);
  for (int i = 0; i < samples * pieces * channels; ++i)
    sums.put(i, static_cast<float>(static_cast<int>(rng() % 9) - 4));
  for (int n = 0; n < samples; ++n) row.put(n, of[n]);
  for (int i = 0; i < rows * columns; ++i) to.output(i);
  const FoldTable p{sums.global(), row.global(), to.global(), samples, pieces, channels, rows, columns};
  for (uint32_t seed = 0; seed < kSchedules; ++seed) {
    to.poison();
    const Launch launch{.grid = 2, .threads = kFoldTableThreads, .seed = seed, .granule = 4, .counters = seed == 0};
    ++schedules_run();
    Report report = run(launch, [&] { fold_table(p); });
    EXPECT(report.ok(), report.what);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) {
        float want = 0;
        for (int n = 0; n < samples; ++n)
          for (int k = 0; c < channels && of[n] == r && k < pieces; ++k)
            want += sums.get((int64_t{1} * n * pieces + k) * channels + c);
        EXPECT(to.stores(r * columns + c) == 1 && to.get(r * columns + c) == want, "row ", r, " column ", c);
      }
    const RaggedGradWork work = fold_table_work(p);
    if (launch.counters) expect_traffic(report, {work.bytes_read, work.bytes_written}, "fold_table");
  }
}

}  // namespace effkern::test::simt
