// Lookups of coded rows, single ones and bags, against sums in double: every type of codes and books, widths around a
// warp's, values out of range, rows that no one asked for forbidden, every schedule.
#include "../../pq/embedding.cuh"
#include "conv_case.h"

namespace effkern::test::simt {
namespace {

using pq::Lookup;

struct Table {
  int rows = 9, positions = 5, stages = 1, books = 1, entries = 7, d = 8, code_bytes = 1;
  bool signed_codes = false;
  std::vector<int> idx = {3, 0, 8, 3}, offsets = {};
  bool wide_idx = false, scale = true, weights = false, mean = false;
  int padding = -1;
  bool wild = false;  // codes out of range too
};

template <class T, bool kWide>
void looks_up(const Table& t, int seeds = kSchedules) {
  std::mt19937 rng(9);
  const auto draw = [&](int below) { return static_cast<int>(rng() % static_cast<uint32_t>(below)); };
  const int width = t.positions * t.d, count = static_cast<int>(t.idx.size());
  const int bags = t.offsets.empty() ? count : static_cast<int>(t.offsets.size());
  const size_t bytes = static_cast<size_t>(t.code_bytes);
  Memory codes("codes", static_cast<size_t>(t.rows * t.positions * t.stages) * bytes, 0, bytes);
  Memory idx("idx", t.idx.size() * (t.wide_idx ? 8 : 4) + 4, kReadable | kDefined, 4);
  Memory offsets("offsets", t.offsets.size() * 4 + 4, kReadable | kDefined, 4);
  Array<T> book("book", t.books * t.entries * t.d), y("y", int64_t{1} * bags * width);
  Array<float> scale("scale", t.rows), weights("weights", count);
  std::vector<int64_t> number(static_cast<size_t>(t.rows * t.positions * t.stages));
  for (int64_t& n : number) n = t.wild && draw(3) == 0 ? t.entries + draw(40) : draw(t.entries);
  if (t.wild && t.signed_codes) number[1] = -3;
  const auto row_of = [&](int i) { return std::clamp(t.idx[static_cast<size_t>(i)], 0, t.rows - 1); };
  for (int i = 0; i < t.books * t.entries * t.d; ++i)
    book.put(i, device::from_float<T>(static_cast<float>(draw(9) - 4)));
  for (size_t i = 0; i < number.size(); ++i) std::memcpy(codes.data() + i * bytes, &number[i], bytes);
  const size_t row_bytes = static_cast<size_t>(t.positions * t.stages) * bytes;
  for (int i = 0; i < count; ++i) {
    const int64_t wide = t.idx[static_cast<size_t>(i)];
    const int32_t narrow = static_cast<int32_t>(wide);
    std::memcpy(idx.data() + i * (t.wide_idx ? 8 : 4), t.wide_idx ? static_cast<const void*>(&wide) : &narrow,
                t.wide_idx ? 8 : 4);
    if (t.weights) weights.put(i, static_cast<float>(draw(3) - 1));
    if (row_of(i) == t.padding) continue;
    codes.permit(static_cast<size_t>(row_of(i)) * row_bytes, row_bytes, kReadable | kDefined);
    if (t.scale) scale.put(row_of(i), 0.5f * static_cast<float>(1 + row_of(i) % 4));
  }
  for (size_t b = 0; b < t.offsets.size(); ++b) std::memcpy(offsets.data() + b * 4, &t.offsets[b], 4);
  for (int64_t i = 0; i < int64_t{1} * bags * width; ++i) y.output(i);

  Lookup<T> p{};
  p.idx = {{reinterpret_cast<const int32_t*>(idx.data()), &idx}, t.wide_idx ? 2 : 1, t.wide_idx};
  if (!t.offsets.empty()) p.offsets = {{reinterpret_cast<const int32_t*>(offsets.data()), &offsets}, 1, false};
  p.codes = {{codes.data(), &codes}, t.code_bytes, t.signed_codes, t.entries};
  p.book = book.global(), p.y = y.global();
  if (t.scale) p.scale = scale.global();
  if (t.weights) p.weights = weights.global();
  p.count = count, p.bags = bags, p.rows = t.rows, p.positions = t.positions, p.stages = t.stages;
  p.d = t.d, p.mean = t.mean, p.padding = t.padding, p.wide = kWide;
  p.book_per_stage = t.stages > 1 && t.books > 1, p.book_per_position = t.stages == 1 && t.books > 1;

  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    y.poison();
    const Launch launch{.grid = 2, .threads = pq::kLookupThreads, .seed = seed, .counters = seed == 0};
    Report report = run(launch, [&] { pq::lookup<T, kWide>(p); });
    EXPECT(report.ok(), report.what);
    if (!report.ok()) return;
    int64_t named = 0, all_kept = 0;
    for (int b = 0; b < bags; ++b)
      for (int at = 0; at < width; ++at) {
        const int begin = t.offsets.empty() ? b : std::clamp(t.offsets[static_cast<size_t>(b)], 0, count);
        const int end = t.offsets.empty() ? b + 1
                        : b + 1 < bags    ? std::clamp(t.offsets[static_cast<size_t>(b) + 1], 0, count)
                                          : count;
        double sum = 0;
        int kept = 0;
        for (int i = begin; i < end; ++i) {
          const int row = row_of(i);
          named += at == 0;
          if (row == t.padding) continue;
          ++kept;
          all_kept += at == 0;
          double value = 0;
          for (int s = 0; s < t.stages; ++s) {
            const int64_t code = std::clamp<int64_t>(
                number[static_cast<size_t>((row * t.positions + at / t.d) * t.stages + s)], 0, t.entries - 1);
            const int of = p.book_per_position ? at / t.d : p.book_per_stage ? s : 0;
            value += device::to_float(book.get((of * t.entries + code) * t.d + at % t.d));
          }
          sum += value * (t.scale ? scale.get(row) : 1.0f) * (t.weights ? weights.get(i) : 1.0f);
        }
        if (t.mean && kept > 0) sum /= kept;
        const float want = device::to_float(device::from_float<T>(static_cast<float>(sum)));
        const float got = device::to_float(y.get(int64_t{1} * b * width + at));
        EXPECT(std::fabs(got - want) <= 0x1p-20 * std::fabs(want) && y.stores(int64_t{1} * b * width + at) == 1, "bag ",
               b, " element ", at, " seed ", seed, ": ", got, " for ", want);
      }
    if (launch.counters) {
      const pq::LookupWork work = pq::lookup_work(p, named, all_kept);
      EXPECT(report.cost[Op::LoadGlobal].asked == work.bytes_in, report.cost[Op::LoadGlobal].asked, " for ",
             work.bytes_in);
      EXPECT(report.cost[Op::StoreGlobal].asked == work.bytes_y);
    }
  }
}

}  // namespace

TEST(lookup_gpu_rows) {
  looks_up<float, true>({});
  looks_up<device::F16, true>({.positions = 40, .padding = 3});  // wider than a warp's chunks
  looks_up<device::BF16, false>({.positions = 9, .d = 5, .scale = false});
  looks_up<float, false>({.positions = 3, .d = 1, .idx = {}});
}

TEST(lookup_gpu_codes_of_every_type) {
  looks_up<float, true>({.code_bytes = 2, .signed_codes = true, .wide_idx = true, .wild = true}, 2);
  looks_up<float, true>({.entries = 300, .code_bytes = 2}, 2);
  looks_up<float, false>({.d = 3, .code_bytes = 4, .signed_codes = true, .idx = {-1, 99, 2}, .wild = true}, 2);
  looks_up<device::F16, true>({.wild = true}, 2);
}

TEST(lookup_gpu_books_of_stages_and_positions) {
  looks_up<float, true>({.stages = 3, .books = 3}, 2);
  looks_up<float, true>({.stages = 2}, 2);
  looks_up<device::F16, false>({.books = 5, .d = 3}, 2);
}

TEST(lookup_gpu_bags) {
  const std::vector<int> idx = {1, 4, 4, 0, 7, 2, 2, 5, 3, 8, 1};
  looks_up<float, true>({.idx = idx, .offsets = {0, 3, 3, 7, 11, 11}, .weights = true});
  looks_up<device::F16, true>({.idx = idx, .offsets = {0, 4, 5}, .mean = true, .padding = 2});
  looks_up<float, false>({.d = 3, .idx = idx, .offsets = {0, 9, 4, 99}}, 2);  // offsets that fall, and past the end
  looks_up<float, true>({.idx = idx, .offsets = {0}, .mean = true, .padding = 4}, 2);
  std::vector<int> many(40), starts(23);
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<int>(i * 5 % 9);
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = static_cast<int>(i * 2);
  looks_up<float, true>({.idx = many, .offsets = starts}, 3);
}

}  // namespace effkern::test::simt
