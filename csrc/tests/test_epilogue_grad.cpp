// The gradient through the epilogue of samples of different widths against the definition in double, with NaN past
// every width and guard pages behind the memory.
#include <cstring>
#include <vector>

#include "../common/parallel.h"
#include "../conv_backward/epilogue_grad.h"
#include "check.h"
#include "oracle.h"
#include "threads.h"

namespace effkern::test {
namespace {

constexpr double kUnit = 0x1p-24;

double slope(double y, double v, Act act) {
  if (act == Act::Relu) return y > 0 ? 1 : 0;
  if (act == Act::Relu6) return y > 0 && y < 6 ? 1 : 0;
  if (act == Act::Hardswish) return v < -3 ? 0 : v <= 3 ? v / 3 + 0.5 : 1;
  const double gate = 1 / (1 + std::exp(-v));
  return act == Act::Silu ? gate * (1 + v * (1 - gate)) : 1;
}

// Other tests go on with the numbers they would have drawn without this one.
class OwnNumbers {
 public:
  ~OwnNumbers() { rng() = before_; }

 private:
  const std::mt19937 before_ = rng();
};

void one_trial(int trial) {
  const int64_t n = draw(1, 3), c = draw(1, 150), h = draw(1, 4), w = draw(1, 70);
  const auto dtype = static_cast<DType>(draw(0, 2));
  const auto act = static_cast<Act>(draw(0, 4));
  const auto layout = static_cast<Layout>(draw(0, 2));
  Buffer gy(dtype, layout, n, c, h, w, draw(0, 5)), y(dtype, layout, n, c, h, w, draw(0, 5));
  Buffer z(DType::F32, Layout::Nhwc, n, c, h, w, draw(0, 5)), g(DType::F32, Layout::Nhwc, n, c, h, w, draw(0, 5));
  std::vector<int64_t> widths;
  for (int64_t i = 0; i < n; ++i) {
    widths.push_back(draw(0, c));
    for (int64_t k = 0; k < widths.back() * h * w; ++k) {
      const int64_t ch = k / (h * w), py = k / w % h, px = k % w;
      gy.set(gy.index(i, ch, py, px), normal());
      y.set(y.index(i, ch, py, px), 4 * normal());
      z.set(z.index(i, ch, py, px), 3 * normal());
    }
  }
  std::vector<float> scale(static_cast<size_t>(2 * c)), shift(scale.size());
  for (float& v : scale) v = normal();
  for (float& v : shift) v = normal();
  const std::vector<int32_t> rows{1, 0, 1};
  std::vector<double> sums(static_cast<size_t>(n * c), -1.0), sums_z = sums;
  conv::EpilogueGrad p;
  p.gy = gy.view(), p.y = y.view(), p.z = z.view(), p.g = g.view();
  p.channels = widths.data();
  p.act = act;
  const bool tables = coin();
  if (tables) p.scale = scale.data(), p.shift = shift.data(), p.table_stride = c, p.table_row = rows.data();
  p.sums = sums.data(), p.sums_z = sums_z.data();
  conv::epilogue_grad(p);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t ch = 0; ch < c; ++ch) {
      double sum = 0, sum_z = 0, size = 0, size_z = 0;
      for (int64_t py = 0; py < h; ++py)
        for (int64_t px = 0; px < w; ++px) {
          const float got = g.at(i, ch, py, px);
          if (ch >= widths[i]) {
            EXPECT(std::isnan(got), "trial ", trial, ": written past a width");
            continue;
          }
          const double factor = tables ? scale[rows[i] * c + ch] : 1, addend = tables ? shift[rows[i] * c + ch] : 0;
          const double value = z.at(i, ch, py, px), v = value * factor + addend, grad = gy.at(i, ch, py, px);
          const double back = grad * slope(y.at(i, ch, py, px), v, act);
          // Of the slope: v's own rounding, and some units for exp and divisions.
          const double error = kUnit * std::fabs(grad) * (16 + std::fabs(value * factor) + std::fabs(addend) + v * v);
          EXPECT(std::fabs(got - back * factor) <= std::fabs(factor) * error, "trial ", trial, ": ", got, " for ",
                 back * factor);
          sum += back, sum_z += back * value;
          size += std::fabs(back) * 16 * kUnit + error;
          size_z += (std::fabs(back) * 16 * kUnit + error) * std::fabs(value);
        }
      EXPECT(std::fabs(sums[i * c + ch] - sum) <= size, "trial ", trial, ": sum of sample ", i, " channel ", ch);
      EXPECT(std::fabs(sums_z[i * c + ch] - sum_z) <= size_z, "trial ", trial, ": sum of products of sample ", i);
    }
  const std::vector<double> alone = sums, alone_z = sums_z;
  set_parallel(on_threads, three);
  conv::epilogue_grad(p);
  set_parallel(serially, one);
  EXPECT(alone == sums && alone_z == sums_z, "trial ", trial, ": threads change a bit");
}

}  // namespace

TEST(the_gradient_through_an_epilogue_matches_the_definition) {
  const OwnNumbers own;
  for (int trial = 0; trial < 200; ++trial) one_trial(trial);
}

}  // namespace effkern::test
