// Whole stages of skipped blocks against the chain in double: kept, dropped and blended blocks, maps that fill the
// threads' sums and maps that do not, strided and unaligned maps, every schedule; weights of blocks that all drop
// forbidden, bytes and tensor core instructions as the model says, no conflict of banks where fragments are read.
#include "../../block_skip/stage.cuh"
#include "conv_case.h"

namespace effkern::test::simt {
namespace {

struct StageCase {
  int n = 2, h = 6, w = 5;
  std::vector<std::vector<float>> keep;  // by sample
  bool soft = false;
  int extra = 0;  // channels of x and y past the ones used
  Act act = Act::Relu;
  bool wide = true;
};

template <class C>
double rounded(double v) {
  return device::to_float(device::from_float<C>(static_cast<float>(v)));
}

// Integers small enough that every sum is exact in every format: any order gives the same.
template <Math kMath, class T, int kC>
void stages(const StageCase& c, int seeds = 2, bool measure = false) {
  std::mt19937 rng(3);
  const auto draw = [&](int below) { return static_cast<int>(rng() % static_cast<uint32_t>(below)); };
  const int blocks = static_cast<int>(c.keep.at(0).size()), pitch = kC + c.extra, pixels = c.h * c.w;
  Array<T> x("x", int64_t{1} * c.n * pixels * pitch), y("y", int64_t{1} * c.n * pixels * pitch);
  Array<float> keep("keep", int64_t{1} * c.n * blocks);
  std::vector<std::unique_ptr<Array<T>>> weights;
  std::vector<std::unique_ptr<Array<float>>> biases;
  std::vector<std::vector<double>> w64;
  int64_t kept = 0;
  for (int i = 0; i < 2 * blocks; ++i) {
    weights.push_back(std::make_unique<Array<T>>("weight", 9 * kC * kC));
    biases.push_back(std::make_unique<Array<float>>("bias", kC));
    w64.emplace_back(static_cast<size_t>(9 * kC * kC));
    bool any = false;
    for (const auto& row : c.keep) any = any || row[static_cast<size_t>(i / 2)] != 0;
    for (int k = 0; k < 9 * kC * kC; ++k) {
      const int value = draw(8 * kC) == 0 ? draw(3) - 1 : 0;  // few enough that numbers stay small
      w64.back()[static_cast<size_t>(k)] = value;
      if (any) weights.back()->put(k, device::from_float<T>(static_cast<float>(value)));
    }
    for (int k = 0; k < kC; ++k)
      if (any) biases.back()->put(k, static_cast<float>(draw(3) - 1));
  }
  for (int n = 0; n < c.n; ++n)
    for (int b = 0; b < blocks; ++b) {
      keep.put(int64_t{1} * n * blocks + b, c.keep[static_cast<size_t>(n)][static_cast<size_t>(b)]);
      kept += c.keep[static_cast<size_t>(n)][static_cast<size_t>(b)] != 0;
    }
  for (int i = 0; i < c.n * pixels; ++i)
    for (int k = 0; k < kC; ++k) {
      // In tf32 three quarters of its last bit more than an integer: it rounds up.
      const float value =
          kMath == Math::TF32 ? static_cast<float>(draw(3) - 1) * (1.0f + 0x3p-12f) : static_cast<float>(draw(9) - 4);
      x.put(int64_t{1} * i * pitch + k, device::from_float<T>(value));
      y.output(int64_t{1} * i * pitch + k);
    }

  block_skip::Stage<T> p{};
  p.x = x.global(), p.y = y.global();
  p.xs = p.ys = {int64_t{1} * pixels * pitch, int64_t{1} * c.w * pitch, pitch};
  p.wide_x = p.wide_y = c.wide;
  p.samples = c.n, p.h = c.h, p.w = c.w, p.channels = kC, p.blocks = blocks;
  p.keep = keep.global(), p.keep_row = blocks, p.soft = c.soft;
  EXPECT(block_skip::clips(c.act, p.low, p.high));
  for (size_t i = 0; i < weights.size(); ++i) p.weight[i] = weights[i]->global(), p.bias[i] = biases[i]->global();
  const size_t shared = static_cast<size_t>(block_skip::stage_shared(kC, sizeof(T), c.h, c.w));
  EXPECT(block_skip::stage_fits(kC, sizeof(T), c.h, c.w, 227 << 10));

  // The chain in double, one sample after the other.
  std::vector<double> want(static_cast<size_t>(c.n * pixels * kC));
  for (int n = 0; n < c.n; ++n) {
    std::vector<double> state(static_cast<size_t>(pixels * kC)), middle, next;
    for (int i = 0; i < pixels; ++i)
      for (int k = 0; k < kC; ++k)
        state[static_cast<size_t>(i * kC + k)] = device::to_float(x.get((int64_t{1} * n * pixels + i) * pitch + k));
    const auto operand = [](double v) -> double {
      if (kMath != Math::TF32) return v;
      return bits_to_float(device::round_tf32(float_to_bits(static_cast<float>(v))));
    };
    const auto convolve = [&](const std::vector<double>& from, int conv) {
      std::vector<double> to(from.size());
      for (int i = 0; i < pixels; ++i)
        for (int o = 0; o < kC; ++o) {
          double sum = biases[static_cast<size_t>(conv)]->get(o);
          for (int t = 0; t < 9; ++t) {
            const int row = i / c.w + t / 3 - 1, column = i % c.w + t % 3 - 1;
            if (row < 0 || row >= c.h || column < 0 || column >= c.w) continue;
            for (int k = 0; k < kC; ++k)
              if (const double v = w64[static_cast<size_t>(conv)][static_cast<size_t>((o * 9 + t) * kC + k)]; v != 0)
                sum += v * operand(from[static_cast<size_t>((row * c.w + column) * kC + k)]);
          }
          to[static_cast<size_t>(i * kC + o)] = sum;
        }
      return to;
    };
    const auto active = [&](double v) {
      return c.act == Act::None ? v : c.act == Act::Relu6 ? std::clamp(v, 0.0, 6.0) : std::max(v, 0.0);
    };
    for (int b = 0; b < blocks; ++b) {
      const float entry = c.keep[static_cast<size_t>(n)][static_cast<size_t>(b)];
      if (entry == 0) continue;
      const double gate = c.soft ? entry : 1.0;
      middle = convolve(state, 2 * b);
      for (double& v : middle) v = rounded<T>(active(v));
      next = convolve(middle, 2 * b + 1);
      for (size_t i = 0; i < state.size(); ++i)
        state[i] = rounded<T>(gate * active(next[i] + state[i]) + (1 - gate) * state[i]);
    }
    std::copy(state.begin(), state.end(), want.begin() + int64_t{1} * n * pixels * kC);
  }

  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    y.poison();
    const Launch launch{.grid = static_cast<unsigned>(c.n),
                        .threads = block_skip::stage_threads(kC),
                        .shared = shared,
                        .seed = seed,
                        .counters = measure && seed == 0};
    Report report = run(launch, [&] { block_skip::stage<kMath, T, kC>(p); });
    EXPECT(report.ok(), report.what);
    if (!report.ok()) return;
    if (launch.counters) {
      const block_skip::StageWork work = block_skip::stage_work(p, kept);
      EXPECT(report.cost[Op::AsyncCopy].asked == work.bytes_x + work.bytes_weights);
      EXPECT(report.cost[Op::StoreGlobal].asked == work.bytes_y);
      EXPECT(kMath == Math::F32 || report.mma == work.macs / (kMath == Math::TF32 ? 1024 : 2048), report.mma);
      const Cost& fragments = report.cost[Op::LoadMatrix];
      EXPECT(fragments.passes == fragments.least, fragments.passes, " passes for ", fragments.least);
      EXPECT(report.cost[Op::StoreGlobal].passes == report.cost[Op::StoreGlobal].least);
    }
    int wrong = 0;
    for (int i = 0; i < c.n * pixels && wrong < 3; ++i)
      for (int k = 0; k < kC; ++k) {
        const int64_t at = int64_t{1} * i * pitch + k;
        const double got = device::to_float(y.get(at)), right = want[static_cast<size_t>(i * kC + k)];
        if (got == right && y.stores(at) == 1) continue;
        ++wrong;
        EXPECT(false, "pixel ", i, " channel ", k, " seed ", seed, ": ", got, " for ", right);
      }
  }
}

const std::vector<std::vector<float>> kSome = {{1, 0, 1}, {0, 1, 1}};

}  // namespace

TEST(stage_gpu_f16) {
  stages<Math::F16, device::F16, 16>({.h = 5, .w = 4, .keep = kSome}, kSchedules);
  stages<Math::F16, device::F16, 32>({.h = 8, .w = 8, .keep = {{0, 1}, {1, 0}}}, 1, true);
  stages<Math::F16, device::F16, 64>({.n = 1, .h = 3, .w = 4, .keep = {{1, 0, 1}}}, kSchedules);
}

// How 16 channels take their columns.
TEST(stage_gpu_columns) {
  stages<Math::F16, device::F16, 16>({.n = 1, .h = 8, .w = 80, .keep = {{1}}}, 1, true);
  stages<Math::F16, device::F16, 16>({.n = 1, .h = 5, .w = 60, .keep = {{1}}}, 2);  // rows 2 to 4 below 0 to 2
  EXPECT(block_skip::stage_fits(16, 2, 32, 32, 227 << 10) && block_skip::stage_fits(16, 2, 8, 128, 227 << 10));
  EXPECT(!block_skip::stage_fits(16, 2, 31, 33, 227 << 10) && !block_skip::stage_fits(16, 2, 1, 129, 227 << 10));
  EXPECT(block_skip::stage_fits(16, 2, 5, 0, 227 << 10));
}

TEST(stage_gpu_masks) {
  stages<Math::F16, device::F16, 16>({.n = 3, .h = 3, .w = 3, .keep = {{0, 0}, {1, 1}, {0, 1}}}, 2);
  stages<Math::F16, device::F16, 16>({.h = 4, .w = 4, .keep = {{0.25f, 1, 0}, {0.5f, 0, 0.5f}}, .soft = true}, 1);
  stages<Math::F16, device::F16, 16>({.h = 4, .w = 4, .keep = {{7, 1}, {0, 200}}}, 1);  // hard: 7 keeps
  stages<Math::BF16, device::BF16, 32>({.n = 1, .h = 1, .w = 1, .keep = {{}}});
  stages<Math::BF16, device::BF16, 32>({.n = 1, .h = 2, .w = 9, .keep = {{1, 1}}, .act = Act::None}, kSchedules);
}

TEST(stage_gpu_layouts) {
  stages<Math::F16, device::F16, 16>({.n = 1, .h = 5, .w = 3, .keep = {{1}}, .extra = 3, .wide = false}, 1);
  stages<Math::F16, device::F16, 16>({.n = 1, .h = 16, .w = 16, .keep = {{1}}, .act = Act::Relu6},
                                     1);  // two rows a column
}

TEST(stage_gpu_f32) {
  stages<Math::F32, float, 16>({.n = 1, .h = 3, .w = 3, .keep = {{1}}, .extra = 4}, kSchedules);
  stages<Math::F32, float, 32>({.n = 1, .h = 3, .w = 23, .keep = {{1}}}, 1);  // two pixels a thread
  stages<Math::TF32, float, 16>({.n = 1, .h = 8, .w = 8, .keep = {{1}}}, 1, true);
}

}  // namespace effkern::test::simt
