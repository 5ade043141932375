// Decoded weights against the book by hand: every form, taps and entries that cross chunks and channels, codes out of
// range, stages and books, every schedule, and bytes as the model says.
#include "../../pq/decode.cuh"
#include "conv_case.h"

namespace effkern::test::simt {
namespace {

struct Layer {
  int rows = 11, positions = 4, d = 8, taps = 1, channels = 32, stages = 1, books = 1, entries = 7, code_bytes = 1;
  bool has_sign = false, scale = true, wild = false;
};

template <class T, int kPer, bool kWhole>
void decodes(const Layer& l, int seeds = 2) {
  std::mt19937 rng(5);
  const auto draw = [&](int below) { return static_cast<int>(rng() % static_cast<uint32_t>(below)); };
  const int count = l.rows * l.positions * l.stages, width = l.taps * l.channels;
  const size_t bytes = static_cast<size_t>(l.code_bytes);
  Memory codes("codes", static_cast<size_t>(count) * bytes, kReadable | kDefined, bytes);
  Array<T> book("book", int64_t{1} * l.books * l.entries * l.d), y("y", int64_t{1} * l.rows * width);
  Array<float> scale("scale", l.rows);
  std::vector<int> number(static_cast<size_t>(count));
  for (int& n : number) n = l.wild && draw(3) == 0 ? l.entries + draw(40) : draw(l.entries);
  if (l.wild && l.has_sign) number[1] = -3;
  for (size_t i = 0; i < number.size(); ++i) std::memcpy(codes.data() + i * bytes, &number[i], bytes);
  for (int i = 0; i < l.books * l.entries * l.d; ++i)
    book.put(i, device::from_float<T>(static_cast<float>(draw(31) - 15)));
  for (int r = 0; r < l.rows; ++r) scale.put(r, 0.5f * static_cast<float>(1 + r % 4));
  for (int64_t i = 0; i < int64_t{1} * l.rows * width; ++i) y.output(i);

  pq::Decoding<T> p{};
  p.codes = {{codes.data(), &codes}, l.code_bytes, l.has_sign, l.entries};
  p.book = book.global(), p.y = y.global();
  if (l.scale) p.scale = scale.global();
  p.rows = l.rows, p.positions = l.positions, p.stages = l.stages, p.d = l.d, p.taps = l.taps, p.channels = l.channels;
  p.book_per_stage = l.stages > 1 && l.books > 1, p.book_per_position = l.stages == 1 && l.books > 1;

  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    y.poison();
    const Launch launch{.grid = 2, .threads = pq::kDecodeThreads, .seed = seed, .counters = seed == 0};
    Report report = run(launch, [&] { pq::decode<T, kPer, kWhole>(p); });
    EXPECT(report.ok(), report.what);
    if (!report.ok()) return;
    if (seed == 0) {
      const pq::DecodeWork work = pq::decode_work(p, kPer, kWhole);
      const int64_t chunks = int64_t{1} * l.rows * width / kPer;
      const int64_t factors = l.scale ? chunks * 4 : 0;
      EXPECT(report.cost[Op::StoreGlobal].bytes == work.bytes_y);
      EXPECT(report.cost[Op::LoadGlobal].asked == work.bytes_codes + work.bytes_book + factors, "loaded ",
             report.cost[Op::LoadGlobal].asked, " for ", chunks, " chunks");
    }
    for (int r = 0; r < l.rows; ++r)
      for (int at = 0; at < width; ++at) {
        const int k = at % l.channels * l.taps + at / l.channels;
        float sum = 0;
        for (int s = 0; s < l.stages; ++s) {
          const int code =
              std::clamp(number[static_cast<size_t>((r * l.positions + k / l.d) * l.stages + s)], 0, l.entries - 1);
          const int of = p.book_per_position ? k / l.d : p.book_per_stage ? s : 0;
          sum += device::to_float(book.get((int64_t{1} * of * l.entries + code) * l.d + k % l.d));
        }
        const float want = device::to_float(device::from_float<T>(sum * (l.scale ? scale.get(r) : 1.0f)));
        const float got = device::to_float(y.get(int64_t{1} * r * width + at));
        EXPECT(got == want && y.stores(int64_t{1} * r * width + at) == 1, "row ", r, " number ", at, " seed ", seed,
               ": ", got, " for ", want);
      }
  }
}

}  // namespace

TEST(decode_gpu_whole_entries) {
  decodes<float, 4, true>({.wild = true}, kSchedules);
  decodes<device::F16, 8, true>({.positions = 5, .d = 16, .channels = 72, .scale = false});  // the last one cut
  decodes<device::BF16, 8, true>({.rows = 40, .positions = 80, .channels = 640, .stages = 2, .books = 2});
  decodes<float, 4, true>({.d = 8, .books = 4, .code_bytes = 2, .has_sign = true, .wild = true});
}

TEST(decode_gpu_taps) {
  decodes<device::F16, 8, false>({.positions = 16, .d = 9, .taps = 9, .channels = 16}, kSchedules);
  decodes<float, 4, false>({.positions = 8, .d = 18, .taps = 9, .channels = 16, .scale = false});
  decodes<device::F16, 8, false>({.positions = 20, .d = 5, .taps = 6, .channels = 16, .stages = 3, .books = 3});
  decodes<float, 4, false>({.positions = 12, .d = 3, .channels = 36, .books = 12, .code_bytes = 4, .wild = true});
}

TEST(decode_gpu_any_size) {
  decodes<device::F16, 1, false>({.positions = 7, .d = 9, .taps = 9, .channels = 7});
  decodes<float, 1, false>({.rows = 19, .positions = 1, .d = 9, .taps = 9, .channels = 1, .code_bytes = 2});
  decodes<device::BF16, 1, false>({.positions = 3, .d = 5, .channels = 13});
  decodes<float, 1, false>({.rows = 0});
}

}  // namespace effkern::test::simt
