// The fused batch norms: every layout, type and instruction set against double, on memory that ends at an untouchable
// page; the inner loops alone, with every tail; threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>

#include "../common/parallel.h"
#include "../multi_branch_bn/kernels.h"
#include "check.h"
#include "oracle.h"

namespace effkern::test {
namespace {

using multi_branch_bn::Backward;
using multi_branch_bn::Forward;
using multi_branch_bn::kMaxBranches;

std::vector<Isa> sets() {
  std::vector<Isa> all = {Isa::Scalar};
  for (const Isa isa : {Isa::Avx2, Isa::Avx512})
    if (isa_available(isa)) all.push_back(isa);
  return all;
}

double unit(DType dtype) { return dtype == DType::F32 ? 0.0 : dtype == DType::BF16 ? 0x1p-8 : 0x1p-11; }

// A random problem, both directions, and its solution in double.
struct Norms {
  int count;
  bool interleaved, training, relu;
  DType dtype;
  int64_t n, c, h, w, m;
  std::vector<std::unique_ptr<Buffer>> x, dx;
  std::unique_ptr<Buffer> y, grad;
  std::vector<std::vector<float>> weight, bias, running_mean, running_var;
  std::vector<double> mean, invstd;
  std::vector<float> new_mean, new_var, dweight, dbias;
  static constexpr double kEps = 1e-5, kMomentum = 0.25;

  Norms(int count, bool interleaved, DType dtype, int64_t n, int64_t c, int64_t h, int64_t w)
      : count(count), interleaved(interleaved), training(coin()), relu(coin()), dtype(dtype), n(n), c(c), h(h), w(w) {
    m = n * h * w;
    if (m == 1) training = false;
    const Layout layout = interleaved ? Layout::Nhwc : Layout::Nchw;
    y = std::make_unique<Buffer>(dtype, layout, n, c, h, w);
    grad = std::make_unique<Buffer>(dtype, static_cast<Layout>(draw(0, 2)), n, c, h, w, draw(0, 3));
    grad->randomize(c);
    for (int i = 0; i < count; ++i) {
      const Layout own = draw(0, 2) == 0 ? static_cast<Layout>(draw(0, 2)) : layout;
      x.push_back(std::make_unique<Buffer>(dtype, own, n, c, h, w, draw(0, 2)));
      x.back()->randomize(c);
      dx.push_back(std::make_unique<Buffer>(dtype, layout, n, c, h, w));
      for (auto* table : {&weight, &bias, &running_mean, &running_var}) {
        table->emplace_back(static_cast<size_t>(c));
        for (float& v : table->back()) v = table == &running_var ? 0.5f + std::fabs(normal()) : normal();
      }
    }
    mean.resize(static_cast<size_t>(count * c)), invstd = mean;
    new_mean.resize(mean.size()), new_var = dweight = new_mean;
    dbias.resize(static_cast<size_t>(c));
  }

  template <class Problem>
  void fill(Problem& p) const {
    p.count = count;
    p.interleaved = interleaved;
    p.training = training;
    p.relu = relu;
    for (int i = 0; i < count; ++i) {
      p.x[i] = x[i]->view();
      p.weight[i] = weight[i].data();
      p.bias[i] = bias[i].data();
    }
  }

  void run() {
    Forward f;
    fill(f);
    f.y = y->view();
    for (int i = 0; i < count; ++i)
      f.running_mean[i] = running_mean[i].data(), f.running_var[i] = running_var[i].data();
    f.momentum = kMomentum, f.eps = kEps;
    f.mean = mean.data(), f.invstd = invstd.data();
    f.new_mean = new_mean.data(), f.new_var = new_var.data();
    multi_branch_bn::forward(f);
    Backward g;
    fill(g);
    g.grad = grad->view();
    for (int i = 0; i < count; ++i)
      if (wanted(i)) g.dx[i] = dx[i]->view();
    g.mean = mean.data(), g.invstd = invstd.data();
    g.dweight = dweight.data(), g.dbias = dbias.data();
    multi_branch_bn::backward(g);
  }

  bool wanted(int i) const { return (i + count + static_cast<int>(c)) % 3 != 0; }

  template <class Body>
  void each(Body body) const {
    for (int64_t s = 0; s < n; ++s)
      for (int64_t r = 0; r < h; ++r)
        for (int64_t q = 0; q < w; ++q) body(s, r, q);
  }

  void check(const std::string& what) const {
    const double u = 0x1p-24;
    for (int64_t k = 0; k < c; ++k) {
      std::vector<double> mu(static_cast<size_t>(count)), inv(mu), sum_gx(mu), size_gx(mu);
      for (int i = 0; i < count; ++i) {
        const size_t at = static_cast<size_t>(i * c + k);
        double average = running_mean[i][k], variance = running_var[i][k];
        if (training) {
          average = variance = 0;
          each([&](int64_t s, int64_t r, int64_t q) { average += x[i]->at(s, k, r, q) / static_cast<double>(m); });
          each([&](int64_t s, int64_t r, int64_t q) {
            variance += std::pow(x[i]->at(s, k, r, q) - average, 2) / static_cast<double>(m);
          });
        }
        mu[i] = average, inv[i] = 1 / std::sqrt(variance + kEps);
        EXPECT(std::fabs(mean[at] - mu[i]) <= 16 * u * (std::fabs(mu[i]) + std::sqrt(variance)), what);
        EXPECT(std::fabs(invstd[at] - inv[i]) <= 64 * u * inv[i], what, " ", invstd[at], " ", inv[i]);
        if (training && m > 1) {
          const double unbiased = variance * static_cast<double>(m) / static_cast<double>(m - 1);
          const double want = (1 - kMomentum) * running_var[i][k] + kMomentum * unbiased;
          EXPECT(std::fabs(new_var[at] - want) <= 64 * u * want, what);
          const double moved = (1 - kMomentum) * running_mean[i][k] + kMomentum * mu[i];
          EXPECT(std::fabs(new_mean[at] - moved) <= 16 * u * (std::fabs(running_mean[i][k]) + 1), what);
        }
      }
      double sum_g = 0, size_g = 0;
      std::vector<double> gz;
      each([&](int64_t s, int64_t r, int64_t q) {
        double z = 0, size = 0;
        for (int i = 0; i < count; ++i) {
          const double hat = (x[i]->at(s, k, r, q) - mu[i]) * inv[i];
          z += weight[i][k] * hat + bias[i][k];
          size += std::fabs(weight[i][k]) * inv[i] * (std::fabs(x[i]->at(s, k, r, q)) + std::fabs(mu[i])) +
                  std::fabs(bias[i][k]);
        }
        // Where z is nearly 0 either side is right; the gradient follows what the forward pass may have seen.
        const double exact = relu && z < 0 ? 0 : z;
        EXPECT(std::fabs(y->at(s, k, r, q) - exact) <= 64 * u * size + unit(dtype) * std::fabs(exact) + 1e-7, what,
               " got ", y->at(s, k, r, q), " expected ", exact);
        const double g = relu && z <= 0 ? 0 : grad->at(s, k, r, q);
        gz.push_back(g);
        sum_g += g, size_g += std::fabs(g);
        for (int i = 0; i < count; ++i) {
          const double hat = (x[i]->at(s, k, r, q) - mu[i]) * inv[i];
          sum_gx[i] += g * hat, size_gx[i] += std::fabs(g * hat) + std::fabs(g * mu[i] * inv[i]);
        }
      });
      EXPECT(std::fabs(dbias[k] - sum_g) <= 64 * u * size_g + 1e-7, what, " dbias ", dbias[k], " ", sum_g);
      for (int i = 0; i < count; ++i) {
        EXPECT(std::fabs(dweight[static_cast<size_t>(i * c + k)] - sum_gx[i]) <= 64 * u * size_gx[i] + 1e-7, what);
        size_t at = 0;
        each([&](int64_t s, int64_t r, int64_t q) {
          const double hat = (x[i]->at(s, k, r, q) - mu[i]) * inv[i], scale = weight[i][k] * inv[i];
          const double batch = training ? (sum_g + hat * sum_gx[i]) / static_cast<double>(m) : 0;
          const double size =
              std::fabs(scale) *
              (std::fabs(gz[at]) +
               (training ? (size_g + (std::fabs(hat) + std::fabs(mu[i] * inv[i])) * size_gx[i]) / static_cast<double>(m)
                         : 0));
          const double exact = scale * (gz[at++] - batch);
          const float got = dx[i]->at(s, k, r, q);
          if (wanted(i))
            EXPECT(std::fabs(got - exact) <= 64 * u * size + unit(dtype) * std::fabs(exact) + 1e-7, what, " dx ", got,
                   " ", exact);
          else
            EXPECT(std::isnan(got), what, " wrote a gradient nobody wants");
        });
      }
    }
  }
};

void on_three_threads(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; ++t) {
    const int64_t from = begin + (end - begin) * t / 3, to = begin + (end - begin) * (t + 1) / 3;
    if (from < to) threads.emplace_back([&body, from, to] { body(from, to); });
  }
  for (std::thread& t : threads) t.join();
}
void serially(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(begin, end);
}
int64_t three() { return 3; }
int64_t one_thread() { return 1; }

std::vector<float> results(const Norms& p) {
  std::vector<float> all(p.dweight);
  all.insert(all.end(), p.dbias.begin(), p.dbias.end());
  all.insert(all.end(), p.new_var.begin(), p.new_var.end());
  for (int64_t i = 0; i < p.y->size(); ++i) all.push_back(p.y->get(i));
  for (const auto& d : p.dx)
    for (int64_t i = 0; i < d->size(); ++i) all.push_back(std::isnan(d->get(i)) ? 0.0f : d->get(i));
  return all;
}

}  // namespace

TEST(fused_norms_match_double) {
  const Isa before = isa();
  for (const Isa set : sets()) {
    set_isa(set);
    for (int trial = 0; trial < 120; ++trial) {
      const bool interleaved = coin();
      const bool wide = draw(0, 9) == 0;
      Norms p(static_cast<int>(draw(1, kMaxBranches)), interleaved, static_cast<DType>(draw(0, 2)), draw(1, 4),
              wide ? draw(120, 150) : draw(1, 40), wide ? 2 : draw(1, 9), draw(1, 17));
      p.run();
      p.check(text(isa_name(set), " trial ", trial, interleaved ? " interleaved " : " planar ", p.n, "x", p.c, "x", p.h,
                   "x", p.w, " type ", static_cast<int>(p.dtype), " branches ", p.count));
    }
    // Several tiles and segments: long planes, and many short ones.
    for (const bool interleaved : {false, true}) {
      Norms few(2, interleaved, DType::F32, 2, 1, 150, 240), many(1, interleaved, DType::F32, 700, 3, 7, 7),
          most(3, interleaved, DType::F32, 3, 2, 50, 53);
      for (Norms* p : {&few, &many, &most}) {
        p->run();
        p->check(text(isa_name(set), interleaved ? " interleaved" : " planar", " segments"));
      }
    }
  }
  set_isa(before);
}

TEST(fused_norms_of_nothing) {
  for (const bool interleaved : {false, true}) {
    Norms p(3, interleaved, DType::F32, 0, 5, 4, 4);
    for (const bool training : {false, true}) {
      p.training = training;
      p.run();
      for (const float v : p.dweight) EXPECT(v == 0.0f);
      for (const float v : p.dbias) EXPECT(v == 0.0f);
    }
    EXPECT(p.new_mean[0] == p.running_mean[0][0] && p.new_var[0] == p.running_var[0][0]);
  }
}

TEST(fused_norms_on_threads_do_not_change_a_bit) {
  for (int trial = 0; trial < 12; ++trial) {
    const bool interleaved = trial % 2 == 0;
    const int64_t channels = trial % 3 == 0 ? 2 : 24;
    Norms p(3, interleaved, DType::F32, 5, channels, 60, trial % 3 == 0 ? 230 : 20);
    p.training = trial % 4 < 3;
    p.run();
    const std::vector<float> alone = results(p);
    set_parallel(on_three_threads, three);
    p.run();
    set_parallel(serially, one_thread);
    EXPECT(alone == results(p), "trial ", trial);
  }
}

// A mean of 10000 deviations, and one that drifts: the variance keeps its digits.
TEST(fused_norms_of_large_means) {
  for (const bool interleaved : {false, true}) {
    Norms p(1, interleaved, DType::F32, 8, 3, 30, 30);
    p.training = true;
    for (int64_t k = 0; k < p.c; ++k)
      p.each([&](int64_t s, int64_t r, int64_t q) {
        const float drift = k == 2 ? 100.0f * static_cast<float>(s * 900 + r * 30 + q) / 900 : 0.0f;
        const float spike = k == 1 && s + r + q == 0 ? 1e5f : 0.0f;
        p.x[0]->set(p.x[0]->index(s, k, r, q), 1e4f + normal() + drift + spike);
      });
    p.run();
    for (int64_t k = 0; k < p.c; ++k) {
      double average = 0, variance = 0;
      p.each([&](int64_t s, int64_t r, int64_t q) { average += p.x[0]->at(s, k, r, q) / static_cast<double>(p.m); });
      p.each([&](int64_t s, int64_t r, int64_t q) {
        variance += std::pow(p.x[0]->at(s, k, r, q) - average, 2) / static_cast<double>(p.m);
      });
      const double invstd = 1 / std::sqrt(variance + Norms::kEps);
      EXPECT(std::fabs(p.mean[static_cast<size_t>(k)] - average) <= 1e-6 / invstd, "mean ", k);
      EXPECT(std::fabs(p.invstd[static_cast<size_t>(k)] / invstd - 1) <= 1e-6, "channel ", k, " ",
             p.invstd[static_cast<size_t>(k)] / invstd - 1);
    }
  }
}

// The 16-lane code on 8-lane registers does what the scalar code does.
TEST(fused_norm_loops_agree) {
  if (!isa_available(Isa::Avx2)) return;
  namespace bn = multi_branch_bn;
  for (int trial = 0; trial < 200; ++trial) {
    const bool interleaved = coin();
    const int64_t planes = interleaved ? 1 : draw(1, 3), pixels = draw(1, 70), channels = interleaved ? draw(1, 50) : 1;
    const int64_t row = interleaved ? channels : pixels, size = planes * pixels * channels;
    std::vector<std::unique_ptr<Guarded>> memory;
    const auto random = [&](int64_t floats) {
      memory.push_back(std::make_unique<Guarded>(static_cast<size_t>(floats) * sizeof(float)));
      for (int64_t i = 0; i < floats; ++i) memory.back()->floats()[i] = normal();
      return memory.back()->floats();
    };
    bn::Tile t{};
    t.planes = planes, t.pixels = pixels, t.channels = channels;
    t.out_pitch = t.grad_pitch = row;
    t.grad = random(size);
    t.shift = random(channels);
    t.floor = coin() ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    for (int i = 0; i < 3; ++i) {
      t.x[i] = random(size), t.x_pitch[i] = row;
      t.mean[i] = random(channels), t.scale[i] = random(channels);
      t.slope[i] = random(channels), t.offset[i] = random(channels);
      t.out[i] = random(size);
    }
    t.sums = random(6 * channels);  // the moments of three branches
    const auto run = [&](const bn::Kernels& kernels) {
      const bn::Loops& loops = interleaved ? kernels.interleaved : kernels.planar;
      std::vector<float> all;
      const auto keep = [&](const float* p, int64_t count) { all.insert(all.end(), p, p + count); };
      loops.moments[2](t);
      keep(t.sums, 6 * channels);
      loops.apply[2](t);
      keep(t.out[0], size);
      loops.grad_sums[2](t);
      keep(t.sums, 4 * channels);
      for (const bn::TileLoop loop : {loops.grad_batch[2], loops.grad_fixed[2]}) {
        loop(t);
        for (float* out : t.out)
          if (out != nullptr) keep(out, size);
      }
      return all;
    };
    const std::vector<float> want = run(bn::scalar::table), got = run(bn::avx2::table16);
    for (size_t i = 0; i < want.size(); ++i)
      EXPECT(std::fabs(want[i] - got[i]) <= 1e-4 * (1 + std::fabs(want[i])), "trial ", trial, " ", i);
  }
}

}  // namespace effkern::test
