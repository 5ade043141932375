// The small kernels of a convolution's gradients: the activation's slope with the bias's sums, the transposed weight,
// and the second passes, around the edges of chunks, tiles and slices.
#include <cmath>
#include <random>

#include "../../conv_backward/act_grad.cuh"
#include "../../conv_backward/backward_model.h"
#include "../../conv_backward/fold.cuh"
#include "../../conv_backward/transpose.cuh"
#include "../check.h"
#include "array.h"
#include "launch.h"
#include "traffic.h"

namespace effkern::test::simt {
namespace {

using namespace conv::gpu;
using device::BF16;
using device::F16;

int draw(int below) {
  static std::mt19937 engine(6);
  return static_cast<int>(engine() % static_cast<uint32_t>(below));
}

template <class T>
T number(int value) {
  return device::from_float<T>(static_cast<float>(value));
}

// The first schedule is counted too.
template <class Kernel>
void run_under(uint32_t seed, unsigned grid, int threads, int shared, size_t granule, const Traffic& model,
               const Kernel& kernel) {
  const Launch launch{.grid = grid,
                      .threads = threads,
                      .shared = static_cast<size_t>(shared),
                      .seed = seed,
                      .resident = seed % 5 == 4 ? 2 : 1,
                      .granule = granule,
                      .counters = seed == 0};
  ++schedules_run();
  Report report = run(launch, kernel);
  EXPECT(report.ok(), report.what);
  if (report.ok() && launch.counters) expect_traffic(report, model, "launch");
}

struct Slope {
  int rows, channels, extra;
  bool with_y = true, with_gz = true, with_sums = true, relu6 = false;
  int slice = 16;
  int64_t far = 0;
};

template <class T>
void slopes(const Slope& s, int seeds = kSchedules) {
  const int pitch = s.channels + s.extra, count = (s.rows + s.slice - 1) / s.slice;
  Array<T> gy("gy", int64_t{1} * s.rows * pitch), y("y", int64_t{1} * s.rows * pitch),
      gz("gz", int64_t{1} * s.rows * pitch);
  Array<float> sums("sums", int64_t{1} * count * s.channels);
  for (int i = 0; i < s.rows; ++i)
    for (int c = 0; c < s.channels; ++c) {
      const int64_t at = int64_t{1} * i * pitch + c;
      gy.put(at, number<T>(draw(9) - 4)), y.put(at, draw(9) == 0 ? device::from_float<T>(NAN) : number<T>(draw(9) - 1));
      gz.output(at);
    }
  for (int64_t i = 0; i < int64_t{1} * count * s.channels; ++i) sums.output(i);
  ActGrad<T> p{};
  p.gy = {gy.global(), pitch}, p.channels = s.channels, p.slices = {s.rows, s.slice, count}, p.relu6 = s.relu6;
  if (s.with_y) p.y = {y.global(), pitch};
  if (s.with_gz) p.gz = {gz.global(), pitch};
  if (s.with_sums) p.sums = sums.global();
  p.wide = pitch % device::kPerChunk<T> == 0;
  const int groups = (s.channels + device::kColumns<T> - 1) / device::kColumns<T>;
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    gz.poison(), sums.poison();
    run_under(seed, static_cast<unsigned>(count * groups), device::kColumnThreads, device::kColumnShared, sizeof(T),
              act_grad_work(p), [&] { act_grad<T>(p); });
    for (int c = 0; c < s.channels; ++c)
      for (int part = 0; part < count; ++part) {
        float sum = 0;
        for (int i = part * s.slice; i < std::min(s.rows, (part + 1) * s.slice); ++i) {
          const int64_t at = int64_t{1} * i * pitch + c;
          const float v = device::to_float(y.get(at));
          const bool flat = s.with_y && (v <= 0 || (s.relu6 && v >= 6));
          const float want = flat ? 0 : device::to_float(gy.get(at));
          sum += want;
          EXPECT(!s.with_gz || (gz.stores(at) == 1 && device::to_float(gz.get(at)) == want), "row ", i, " channel ", c);
        }
        const int64_t at = int64_t{1} * part * s.channels + c;
        EXPECT(!s.with_sums || (sums.stores(at) == 1 && sums.get(at) == sum), "sum ", c, " of slice ", part);
      }
  }
}

// One weight of [groups][rows][taps][inputs] and where a plain loop puts it.
template <class T>
void transposes(int groups, int rows, int inputs, Size2 kernel, Size2 step, int c_out, int c_in, int seeds) {
  const int taps = kernel.h * kernel.w, pitch = c_out + 3;
  Array<T> weight("weight", int64_t{1} * groups * rows * taps * inputs),
      to("to", int64_t{1} * groups * c_in * taps * pitch);
  const auto from = [&](int g, int o, int tap, int c) {
    return ((int64_t{1} * g * rows + o) * taps + tap) * inputs + c;
  };
  const auto place = [&](int g, int c, int at, int o) { return ((int64_t{1} * g * c_in + c) * taps + at) * pitch + o; };
  for (int g = 0; g < groups; ++g)
    for (int o = 0; o < c_out; ++o)
      for (int tap = 0; tap < taps; ++tap)
        for (int c = 0; c < c_in; ++c)
          weight.put(from(g, o, tap, c), number<T>(draw(200) - 100)), to.output(place(g, c, tap, o));
  const Transpose<T> p{weight.global(),
                       int64_t{1} * taps * inputs,
                       1,
                       int64_t{1} * kernel.w * inputs,
                       inputs,
                       to.global(),
                       groups,
                       rows,
                       c_out,
                       c_in,
                       pitch,
                       kernel,
                       step};
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    to.poison();
    run_under(seed, 3, kTransposeThreads, kTransposeShared, sizeof(T), transpose_work(p), [&] { transpose<T>(p); });
    // By residues, in each from the last tap to the first.
    int at = 0;
    for (int rh = 0; rh < std::min(step.h, kernel.h); ++rh)
      for (int rw = 0; rw < std::min(step.w, kernel.w); ++rw) {
        EXPECT(class_place(kernel, step, {rh, rw}) == at);
        for (int h = kernel.h - 1; h >= 0; --h)
          for (int w = kernel.w - 1; w >= 0; --w) {
            if (h % step.h != rh || w % step.w != rw) continue;
            for (int g = 0; g < groups; ++g)
              for (int o = 0; o < c_out; ++o)
                for (int c = 0; c < c_in; ++c) {
                  const float got = device::to_float(to.get(place(g, c, at, o)));
                  EXPECT(to.stores(place(g, c, at, o)) == 1 &&
                             got == device::to_float(weight.get(from(g, o, h * kernel.w + w, c))),
                         "group ", g, " output ", o, " input ", c, " tap ", h, ",", w);
                }
            ++at;
          }
      }
  }
}

struct Folded {
  int groups = 1, rows = 5, inputs = 6, kernel = 3, slices = 4, run_groups = 1, c_out = 3, c_in = 5, tap_columns = 8;
};

template <class T>
void folds(const Folded& f, int seeds = kSchedules) {
  const int taps = f.kernel * f.kernel, columns = taps * f.tap_columns, part = f.run_groups * f.c_out * columns;
  const int64_t elements = int64_t{1} * f.groups * f.rows * taps * f.inputs;
  Array<float> parts("parts", int64_t{1} * f.slices * part);
  Array<T> gw("gw", elements);
  const auto of_part = [&](int s, int g, int o, int tap, int c) {
    return int64_t{1} * s * part + (int64_t{1} * g * f.c_out + o) * columns + tap * f.tap_columns + c;
  };
  for (int s = 0; s < f.slices; ++s)
    for (int g = 0; g < f.run_groups; ++g)
      for (int o = 0; o < f.c_out; ++o)
        for (int tap = 0; tap < taps; ++tap)
          for (int c = 0; c < f.c_in; ++c) parts.put(of_part(s, g, o, tap, c), static_cast<float>(draw(9) - 4));
  for (int64_t i = 0; i < elements; ++i) gw.output(i);
  const int area = taps * f.inputs;  // [output][input][h][w]
  const Fold<T> p{parts.global(), part,    f.slices,      gw.global(), area,     taps,
                  f.kernel,       1,       elements,      f.inputs,    f.rows,   f.run_groups,
                  f.c_in,         f.c_out, f.tap_columns, columns,     f.kernel, taps};
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    gw.poison();
    run_under(seed, 2, kFoldThreads, 0, sizeof(T), fold_work(p), [&] { fold<T>(p); });
    for (int o = 0; o < f.groups * f.rows; ++o)
      for (int c = 0; c < f.inputs; ++c)
        for (int tap = 0; tap < taps; ++tap) {
          float want = 0;
          if (o / f.rows < f.run_groups && o % f.rows < f.c_out && c < f.c_in)
            for (int s = 0; s < f.slices; ++s) want += parts.get(of_part(s, o / f.rows, o % f.rows, tap, c));
          const int64_t at = int64_t{1} * o * area + c * taps + tap;
          EXPECT(gw.stores(at) == 1 && device::to_float(gw.get(at)) == want, "output ", o, " input ", c, " tap ", tap);
        }
  }
}

}  // namespace

TEST(act_grad_gpu) {
  slopes<F16>({.rows = 37, .channels = 70, .extra = 2});
  slopes<BF16>({.rows = 20, .channels = 9, .extra = 0, .relu6 = true});
  slopes<float>({.rows = 50, .channels = 33, .extra = 3, .slice = 48});
  slopes<float>({.rows = 3, .channels = 8, .extra = 0, .with_y = false, .with_gz = false}, 2);
  slopes<F16>({.rows = 3, .channels = 8, .extra = 8, .with_sums = false}, 2);
}

TEST(transpose_gpu) {
  transposes<F16>(1, 70, 40, {3, 3}, {1, 1}, 65, 33, 8);
  transposes<float>(2, 9, 7, {3, 5}, {2, 3}, 5, 6, 8);
  transposes<BF16>(1, 4, 4, {2, 1}, {4, 2}, 4, 4, 2);
  transposes<float>(3, 1, 3, {1, 1}, {1, 1}, 1, 1, 2);
}

TEST(fold_gpu) {
  folds<float>({});
  folds<F16>({.groups = 3, .kernel = 1, .slices = 1, .run_groups = 2, .c_out = 4, .c_in = 6});
  folds<BF16>({.rows = 40, .inputs = 20, .c_out = 40, .c_in = 20, .tap_columns = 24}, 2);
}

TEST(fold_sums_gpu) {
  Array<float> parts("parts", 3 * 600), to("to", 600);
  for (int i = 0; i < 3 * 600; ++i) parts.put(i, static_cast<float>(draw(9) - 4));
  for (int i = 0; i < 600; ++i) to.output(i);
  const FoldSums p{parts.global(), to.global(), 3, 600};
  for (uint32_t seed = 0; seed < kSchedules; ++seed) {
    to.poison();
    run_under(seed, 2, kFoldThreads, 0, 4, fold_sums_work(p), [&] { fold_sums(p); });
    for (int i = 0; i < 600; ++i)
      EXPECT(to.stores(i) == 1 && to.get(i) == parts.get(i) + parts.get(600 + i) + parts.get(1200 + i));
  }
}

}  // namespace effkern::test::simt
