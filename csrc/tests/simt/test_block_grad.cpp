// The gradient at a skipped block's sum (csrc/block_skip/block_grad.cuh): masks of every kind, channels around chunks
// and blocks, pieces that end early, NaN in what may not be used, every schedule.
#include <cmath>
#include <random>

#include "../../block_skip/block_grad.cuh"
#include "../check.h"
#include "activation.h"
#include "array.h"
#include "launch.h"

namespace effkern::test::simt {
namespace {

using namespace block_skip;
using device::BF16;
using device::F16;

struct Sums {
  int samples = 5, pixels = 37, channels = 20, piece = 16;
  Act act = Act::Relu;
  bool soft = false, with_keep = true, with_gz = true, with_rest = true, with_sums = true, with_dots = false;
  int extra = 0;  // channels between two pixels that no one may read
};

template <class T>
void sums_hold(const Sums& s, int seeds = kSchedules) {
  std::mt19937 rng(8);
  const auto number = [&] { return device::from_float<T>(static_cast<float>(static_cast<int>(rng() % 65) - 32) / 4); };
  const int pitch = s.channels + s.extra, pieces = (s.pixels + s.piece - 1) / s.piece;
  const int groups = device::column_groups<T>(s.channels);
  const int64_t size = int64_t{1} * s.samples * s.pixels * pitch;
  Array<T> gy("gy", size), z("z", size), old("old", size), gz("gz", size), rest("rest", size);
  Array<float> keep("keep", 2 * s.samples), sums("sums", int64_t{1} * s.samples * pieces * s.channels),
      dots("dots", int64_t{1} * pieces * groups * s.samples);
  const float masks[] = {s.soft ? 1.0f : 3.0f, 0, 0.25f, 0.875f};  // what is not 0 keeps
  int64_t kept = 0;
  for (int n = 0; n < s.samples; ++n) keep.put(2 * n, masks[n % (s.soft ? 4 : 2)]);
  const auto mask = [&](int n) { return s.with_keep ? keep.get(2 * n) : 1.0f; };
  for (int n = 0; n < s.samples; ++n) {
    kept += mask(n) != 0;
    for (int i = n * s.pixels; i < (n + 1) * s.pixels; ++i)
      for (int c = 0; c < s.channels; ++c) {
        const int64_t at = int64_t{1} * i * pitch + c;
        gy.put(at, number());
        if (mask(n) != 0 || s.with_dots) z.put(at, number()), old.put(at, number());
        if (mask(n) != 0) gz.output(at);
        rest.output(at);
      }
  }
  for (int64_t i = 0; i < int64_t{1} * s.samples * pieces * s.channels; ++i) sums.output(i);
  for (int64_t i = 0; i < int64_t{1} * pieces * groups * s.samples; ++i) dots.output(i);
  BlockGrad<T> p{};
  p.gy = {gy.global(), pitch};
  if (s.act != Act::None || s.with_dots) p.z = {z.global(), pitch};
  if (s.with_dots) p.old = {old.global(), pitch}, p.dots = dots.global();
  if (s.with_gz) p.gz = {gz.global(), pitch};
  if (s.with_rest) p.rest = {rest.global(), pitch};
  if (s.with_keep) p.keep = keep.global(), p.keep_step = 2;
  if (s.with_sums) p.sums = sums.global();
  p.soft = s.soft, p.samples = s.samples, p.pixels = s.pixels, p.channels = s.channels;
  p.pieces = pieces, p.piece = s.piece, p.act = s.act, p.wide = pitch % device::kPerChunk<T> == 0;
  const double u = sizeof(T) == 4 ? 0x1p-22 : std::is_same_v<T, F16> ? 0x1p-10 : 0x1p-7;
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    gz.poison(), rest.poison(), sums.poison(), dots.poison();
    const Launch launch{.grid = static_cast<unsigned>(s.samples * pieces * groups),
                        .threads = device::kColumnThreads,
                        .shared = device::kColumnShared,
                        .seed = seed,
                        .resident = seed % 5 == 4 ? 2 : 1,
                        .granule = sizeof(T),
                        .counters = seed == 0};
    ++schedules_run();
    Report report = run(launch, [&] { block_grad<T>(p); });
    EXPECT(report.ok(), report.what);
    if (launch.counters) {
      const BlockGradWork work = block_grad_work(p, kept);
      EXPECT(report.cost[Op::LoadGlobal].asked == work.bytes_read, report.cost[Op::LoadGlobal].asked, " bytes read");
      EXPECT(report.cost[Op::StoreGlobal].asked == work.bytes_written, report.cost[Op::StoreGlobal].asked, " written");
    }
    for (int n = 0; n < s.samples; ++n) {
      const double m = mask(n), gate = s.soft || m == 0 ? m : 1;
      double dot = 0;
      for (int c = 0; c < s.channels; ++c)
        for (int part = 0; part < pieces; ++part) {
          double sum = 0, most = 0;
          for (int i = part * s.piece; i < std::min(s.pixels, (part + 1) * s.piece); ++i) {
            const int64_t at = (int64_t{1} * n * s.pixels + i) * pitch + c;
            const double g = device::to_float(gy.get(at)), v = m != 0 || s.with_dots ? device::to_float(z.get(at)) : 0;
            const double want = m == 0 ? 0 : gate * g * slope(v, s.act), left = want + (1 - gate) * g;
            sum += want, most += std::fabs(want);
            if (s.with_dots) dot += g * (activated(v, s.act) - device::to_float(old.get(at)));
            const double bound = u * (std::fabs(want) + std::fabs(g));
            if (s.with_gz && m != 0)
              EXPECT(gz.stores(at) == 1 && std::fabs(device::to_float(gz.get(at)) - want) <= bound, "gz ", n, " ", c);
            if (s.with_rest)
              EXPECT(rest.stores(at) == 1 && std::fabs(device::to_float(rest.get(at)) - left) <= bound, "rest ", n, " ",
                     c);
          }
          const int64_t at = (int64_t{1} * n * pieces + part) * s.channels + c;
          if (s.with_sums)
            EXPECT(sums.stores(at) == 1 && std::fabs(sums.get(at) - sum) <= 0x1p-18 * most, "sum ", n, " ", c, " ",
                   part);
        }
      float got = 0;
      for (int i = 0; s.with_dots && i < pieces * groups; ++i) got += dots.get(int64_t{1} * i * s.samples + n);
      if (s.with_dots)
        EXPECT(std::fabs(got - dot) <= 0x1p-14 * (1 + std::fabs(dot)), "dot ", n, " is ", got, " not ", dot);
    }
  }
}

}  // namespace

TEST(block_grad_gpu) {
  sums_hold<F16>({.channels = 70, .extra = 2});
  sums_hold<BF16>({.channels = 9, .act = Act::Relu6, .soft = true});
  sums_hold<float>({.pixels = 50, .channels = 33, .piece = 32, .act = Act::Hardswish, .soft = true, .with_dots = true});
  sums_hold<F16>({.samples = 4, .channels = 64, .act = Act::Silu, .soft = true, .with_sums = false, .with_dots = true},
                 3);
  sums_hold<float>({.channels = 8, .with_rest = false, .extra = 3}, 3);
  sums_hold<float>({.channels = 8, .act = Act::None, .with_gz = false}, 3);
  sums_hold<float>({.samples = 3, .pixels = 1, .channels = 5, .with_keep = false}, 2);
}

}  // namespace effkern::test::simt
