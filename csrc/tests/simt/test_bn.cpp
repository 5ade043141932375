// The kernels of multi_branch_bn_add_relu and its gradient, one by one, against sums in double: one to four branches,
// channels around chunks and blocks, slices that end early, training and not, every schedule.
#include <cmath>
#include <random>
#include <vector>

#include "../../multi_branch_bn/bn_backward.cuh"
#include "../../multi_branch_bn/bn_model.h"
#include "../check.h"
#include "array.h"
#include "launch.h"
#include "traffic.h"

namespace effkern::test::simt {
namespace {

using namespace multi_branch_bn::gpu;
using device::BF16;
using device::F16;

struct Bn {
  int branches = 2, rows = 37, channels = 20, slice = 16;
  bool training = true, relu = true, tracked = true, chunks = true;
  float mean = 0.0f;  // of x, by branch
};

template <class T>
class Layer {
 public:
  explicit Layer(const Bn& c) : c_(c), rng_(7) {
    constexpr int u = device::kPerChunk<T>;
    pitch_ = c.chunks ? (c.channels + u) / u * u : c.channels + 1;
    slices_ = {c.rows, c.slice, (c.rows + c.slice - 1) / c.slice};
    for (int i = 0; i < kBranches; ++i) {
      x_.emplace_back("x", int64_t{1} * c.rows * pitch_), dx_.emplace_back("dx", int64_t{1} * c.rows * pitch_);
      if (i < c.branches) fill(x_.back(), c.mean * static_cast<float>(i + 1));
    }
    for (auto* map : {&grad_, &y_}) map->emplace_back("map", int64_t{1} * c.rows * pitch_);
    fill(grad_[0], 0.0f);
    for (int v = 0; v < 4 * kBranches; ++v) {
      vectors_.emplace_back("vector", c.channels);
      for (int k = 0; k < c.channels; ++k)
        vectors_.back().put(k,
                            (v / kBranches == 3 ? 0.5f : -0.5f) + std::uniform_real_distribution<float>(0, 1.5f)(rng_));
    }
    for (int i = 0; i < c.rows; ++i)
      for (int k = 0; k < c.channels; ++k) {
        y_[0].output(int64_t{1} * i * pitch_ + k);
        for (int b = 0; b < c.branches; ++b) dx_[static_cast<size_t>(b)].output(int64_t{1} * i * pitch_ + k);
      }
    // The kernels' own results, readable by the next one, are put here by `run`.
    reference();
  }

  void runs(int seeds) {
    for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) forward(seed), backward(seed);
  }

 private:
  using Floats = std::vector<double>;

  void fill(Array<T>& map, float mean) {
    std::normal_distribution<float> normal(mean, 1.0f);
    for (int i = 0; i < c_.rows; ++i)
      for (int k = 0; k < c_.channels; ++k) map.put(int64_t{1} * i * pitch_ + k, device::from_float<T>(normal(rng_)));
  }
  double x(int b, int row, int k) const {
    return device::to_float(x_[static_cast<size_t>(b)].get(int64_t{1} * row * pitch_ + k));
  }
  double vector(int kind, int b, int k) const { return vectors_[static_cast<size_t>(kind * kBranches + b)].get(k); }
  Vectors give(int kind) const {
    Vectors all{};
    for (int b = 0; b < c_.branches; ++b) all.of[b] = vectors_[static_cast<size_t>(kind * kBranches + b)].global();
    return all;
  }
  size_t at(int b, int k) const { return static_cast<size_t>(b * c_.channels + k); }
  int blocks() const { return device::column_groups<T>(c_.channels) * slices_.count; }
  Maps<T> maps() const {
    Maps<T> all{};
    for (int b = 0; b < c_.branches; ++b) all.x[b] = {x_[static_cast<size_t>(b)].global(), pitch_};
    all.count = c_.branches, all.channels = c_.channels, all.slices = slices_;
    all.wide = pitch_ % device::kPerChunk<T> == 0;
    return all;
  }

  void reference() {
    const int all = c_.branches * c_.channels;
    mean_.assign(static_cast<size_t>(all), 0), variance_ = mean_, dweight_ = mean_;
    dbias_.assign(static_cast<size_t>(c_.channels), 0);
    for (int b = 0; b < c_.branches; ++b)
      for (int k = 0; k < c_.channels; ++k) {
        if (!c_.training) {
          mean_[at(b, k)] = vector(2, b, k), variance_[at(b, k)] = vector(3, b, k);
          continue;
        }
        for (int i = 0; i < c_.rows; ++i) mean_[at(b, k)] += x(b, i, k) / c_.rows;
        for (int i = 0; i < c_.rows; ++i) variance_[at(b, k)] += std::pow(x(b, i, k) - mean_[at(b, k)], 2) / c_.rows;
      }
  }
  double invstd(int b, int k) const { return 1 / std::sqrt(variance_[at(b, k)] + kEps); }
  double hat(int b, int i, int k) const { return (x(b, i, k) - mean_[at(b, k)]) * invstd(b, k); }
  double z(int i, int k) const {
    double sum = 0;
    for (int b = 0; b < c_.branches; ++b) sum += hat(b, i, k) * vector(0, b, k) + vector(1, b, k);
    return sum;
  }
  // Near 0 fp32 may decide otherwise about the relu.
  bool undecided(int i, int k) const { return c_.relu && std::fabs(z(i, k)) < tolerance(); }
  double tolerance() const { return 0x1p-18 * (1 + std::fabs(c_.mean) * kBranches); }
  double g(int i, int k) const {
    return c_.relu && z(i, k) <= 0 ? 0.0 : device::to_float(grad_[0].get(int64_t{1} * i * pitch_ + k));
  }

  // The first schedule is counted too.
  template <class Kernel>
  void run(uint32_t seed, int grid, int threads, int shared, const Traffic& model, const Kernel& kernel) {
    const Launch launch{.grid = static_cast<unsigned>(grid),
                        .threads = threads,
                        .shared = static_cast<size_t>(shared),
                        .seed = seed,
                        .resident = seed % 5 == 4 ? 2 : 1,
                        .granule = 4,
                        .counters = seed == 0};
    ++schedules_run();
    Report report = simt::run(launch, kernel);
    EXPECT(report.ok(), report.what);
    if (report.ok() && launch.counters) expect_traffic(report, model, "launch");
  }
  static void outputs(auto& array, int64_t size) {
    for (int64_t i = 0; i < size; ++i) array.output(i);
    array.poison();
  }
  // What a kernel wrote, for the next one to read.
  static void publish(auto& array, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      EXPECT(array.stores(i) == 1, "element ", i, " stored ", array.stores(i), " times");
      array.put(i, array.get(i));
    }
  }
  void close(double got, double want, double bound, const char* what, int k) {
    EXPECT(std::fabs(got - want) <= bound, what, " of channel ", k, ": ", got, " for ", want);
  }
  double last(double value) const {
    return (sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, BF16> ? 0x1p-8 : 0x1p-11) * std::fabs(value) + 0x1p-24;
  }

  void forward(uint32_t seed) {
    const int finish = (c_.channels + kFinishChannels - 1) / kFinishChannels, all = c_.branches * c_.channels;
    Array<float> parts("parts", int64_t{2} * all * slices_.count), scale("scale", all), shift("shift", c_.channels),
        new_mean("new_mean", all), new_var("new_var", all);
    Array<double> mean("mean", all), invstd_of("invstd", all);
    Finish f{};
    if (c_.training) {
      outputs(parts, int64_t{2} * all * slices_.count);
      const Statistics<T> p{maps(), parts.global()};
      run(seed, blocks() * c_.branches, device::kColumnThreads, kStatisticsShared, statistics_work(p),
          [&] { bn_statistics<T>(p); });
      publish(parts, int64_t{2} * all * slices_.count);
      f.parts = parts.global();
    }
    for (Array<float>* table : {&scale, &new_mean, &new_var}) outputs(*table, all);
    outputs(shift, c_.channels), outputs(mean, all), outputs(invstd_of, all);
    f.slices = slices_, f.count = c_.branches, f.channels = c_.channels, f.momentum = 0.25, f.eps = kEps;
    f.weight = give(0), f.bias = give(1);
    if (c_.tracked) f.running_mean = give(2), f.running_var = give(3);
    f.mean = mean.global(), f.invstd = invstd_of.global(), f.scale = scale.global(), f.shift = shift.global();
    const bool updated = c_.tracked && c_.training;
    if (updated) f.new_mean = new_mean.global(), f.new_var = new_var.global();
    run(seed, finish, c_.branches * kTermThreads, kFinishShared, finish_work(f), [&] { bn_finish(f); });
    publish(scale, all), publish(shift, c_.channels), publish(mean, all), publish(invstd_of, all);
    for (int b = 0; b < c_.branches; ++b)
      for (int k = 0; k < c_.channels; ++k) {
        const auto i = static_cast<int64_t>(at(b, k));
        close(mean.get(i), mean_[at(b, k)], 0x1p-20 * (1 + std::fabs(mean_[at(b, k)])), "mean", k);
        // Squares of the values themselves would err by their share of the variance: 1e5 of it.
        const double off = 1 + std::fabs(mean_[at(b, k)]) / 64;
        close(invstd_of.get(i), invstd(b, k), 0x1p-18 * off * invstd(b, k), "invstd", k);
        if (!updated) continue;
        const double unbiased = variance_[at(b, k)] * c_.rows / (c_.rows - 1.0);
        close(new_mean.get(i), 0.75 * vector(2, b, k) + 0.25 * mean_[at(b, k)],
              0x1p-20 * (1 + std::fabs(mean_[at(b, k)])), "running mean", k);
        close(new_var.get(i), 0.75 * vector(3, b, k) + 0.25 * unbiased, 0x1p-19 * (1 + unbiased), "running variance",
              k);
      }
    y_[0].poison();
    const Apply<T> a{maps(), scale.global(), shift.global(), {y_[0].global(), pitch_}, c_.relu};
    run(seed, blocks(), device::kColumnThreads, 0, apply_work(a), [&] { bn_apply<T>(a); });
    for (int i = 0; i < c_.rows; ++i)
      for (int k = 0; k < c_.channels; ++k) {
        const double want = c_.relu ? std::max(z(i, k), 0.0) : z(i, k);
        const int64_t place = int64_t{1} * i * pitch_ + k;
        EXPECT(y_[0].stores(place) == 1);
        close(device::to_float(y_[0].get(place)), want, tolerance() + last(want), "y", k);
      }
  }

  void backward(uint32_t seed) {
    const int all = c_.branches * c_.channels, sums = (1 + c_.branches) * c_.channels * slices_.count;
    Array<float> parts("parts", sums), dweight("dweight", all), dbias("dbias", c_.channels), slope("slope", all),
        offset("offset", all);
    Array<double> mean("mean", all), invstd_of("invstd", all);
    for (int b = 0; b < c_.branches; ++b)
      for (int k = 0; k < c_.channels; ++k)
        mean.put(static_cast<int64_t>(at(b, k)), mean_[at(b, k)]),
            invstd_of.put(static_cast<int64_t>(at(b, k)), invstd(b, k));
    const Gradient<T> of{maps(), {grad_[0].global(), pitch_}, mean.global(), invstd_of.global(), give(0), give(1),
                         c_.relu};
    outputs(parts, sums);
    const GradientSums<T> s{of, parts.global()};
    run(seed, blocks(), device::kColumnThreads, kSumsShared<T>, gradient_sums_work(s), [&] { bn_gradient_sums<T>(s); });
    publish(parts, sums);
    for (Array<float>* table : {&dweight, &slope, &offset}) outputs(*table, all);
    outputs(dbias, c_.channels);
    const GradientFinish f{parts.global(), slices_,        c_.branches,        c_.channels,
                           give(0),        mean.global(),  invstd_of.global(), dweight.global(),
                           dbias.global(), slope.global(), offset.global()};
    run(seed, (c_.channels + kFinishChannels - 1) / kFinishChannels, (1 + c_.branches) * kTermThreads, kFinishShared,
        gradient_finish_work(f), [&] { bn_gradient_finish(f); });
    publish(dweight, all), publish(dbias, c_.channels), publish(slope, all), publish(offset, all);
    GradientApply<T> a{};
    a.of = of, a.slope = slope.global(), a.offset = offset.global(), a.training = c_.training;
    for (int b = 0; b < c_.branches; ++b)
      if (wanted(b)) dx_[static_cast<size_t>(b)].poison(), a.dx[b] = {dx_[static_cast<size_t>(b)].global(), pitch_};
    run(seed, blocks(), device::kColumnThreads, kGradientShared<T>, gradient_apply_work(a),
        [&] { bn_gradient_apply<T>(a); });
    for (int k = 0; k < c_.channels; ++k) gradients_of(k, dweight, dbias);
  }

  bool wanted(int b) const { return b != 1 || c_.branches != 3; }

  void gradients_of(int k, const Array<float>& dweight, const Array<float>& dbias) {
    double sum = 0, loose = 0;
    for (int i = 0; i < c_.rows; ++i) {
      sum += g(i, k);
      if (undecided(i, k)) loose += 8;
    }
    const double near = 0x1p-17 * c_.rows * (1 + std::fabs(c_.mean)) + 8 * loose;
    close(dbias.get(k), sum, near, "dbias", k);
    for (int b = 0; b < c_.branches; ++b) {
      double product = 0;
      for (int i = 0; i < c_.rows; ++i) product += g(i, k) * hat(b, i, k);
      close(dweight.get(static_cast<int64_t>(at(b, k))), product, near, "dweight", k);
      const double scale = vector(0, b, k) * invstd(b, k);
      for (int i = 0; i < c_.rows && wanted(b); ++i) {
        const int64_t place = int64_t{1} * i * pitch_ + k;
        const double rest = c_.training ? (sum + hat(b, i, k) * product) / c_.rows : 0.0;
        const double want = scale * (g(i, k) - rest);
        const Array<T>& dx = dx_[static_cast<size_t>(b)];
        EXPECT(dx.stores(place) == 1);
        const double bound = 4 * near / c_.rows + (undecided(i, k) ? 8 : 0) + last(want) + 0x1p-17;
        close(device::to_float(dx.get(place)), want, bound * std::max(1.0, std::fabs(scale)), "dx", k);
      }
    }
  }

  static constexpr double kEps = 1e-5;
  const Bn c_;
  std::mt19937 rng_;
  int pitch_ = 0;
  device::Slices slices_{};
  std::vector<Array<T>> x_, dx_, grad_, y_;
  std::vector<Array<float>> vectors_;
  Floats mean_, variance_, dweight_, dbias_;
};

template <class T>
void layer(const Bn& c, int seeds = kSchedules) {
  Layer<T>(c).runs(seeds);
}

}  // namespace

TEST(bn_gpu_training) {
  layer<F16>({.branches = 3, .rows = 53, .channels = 70});
  layer<F16>({.branches = 2, .rows = 150, .channels = 12, .slice = 128}, 2);  // several rows at once, and what is left
  layer<float>({.branches = 2, .rows = 300, .channels = 9}, 2);               // more slices than lanes that add them up
  layer<BF16>({.branches = 4, .channels = 9, .relu = false}, 3);
  layer<float>({.branches = 1, .rows = 20, .channels = 130, .tracked = false}, 3);
  layer<float>({.branches = 2, .rows = 3, .channels = 5, .chunks = false});
}

TEST(bn_gpu_eval) {
  layer<F16>({.branches = 2, .channels = 8, .training = false}, 3);
  layer<float>({.branches = 3, .rows = 40, .channels = 33, .slice = 32, .training = false, .relu = false}, 3);
}

TEST(bn_gpu_mean_far_from_zero) { layer<float>({.branches = 2, .rows = 64, .channels = 6, .mean = 300.0f}, 3); }

}  // namespace effkern::test::simt
