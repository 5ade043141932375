#include "epilogue_grad.h"

#include <algorithm>

#include "../common/parallel.h"
#include "stage.h"

namespace effkern::conv {
namespace {

#include "../common/lanes_impl.h"
#include "../conv/activation_impl.h"

constexpr int kLanes = 4;           // of SSE2: the pass is bound by memory
constexpr int64_t kBlock = 64;      // channels at a time
constexpr int64_t kPixels = 32;     // of a row at a time: four copies of a piece stay in L1
constexpr int64_t kTask = 1 << 14;  // elements a task should have: as much as a second thread's wake-up costs

using Vec = Lanes<kLanes>::Vec;

// The slope of the activation at its input v and output y, times the gradient g; as torch does it, a NaN output lets
// the gradient through, and a clipped one gives 0 whatever the gradient is.
template <Act kAct>
Vec back(Vec g, Vec y, Vec v) {
  const Vec zero{}, one = zero + 1.0f;
  if constexpr (kAct == Act::Relu) return y <= zero ? zero : g;
  if constexpr (kAct == Act::Relu6) return y <= zero ? zero : y >= zero + 6.0f ? zero : g;
  if constexpr (kAct == Act::Hardswish) {
    const Vec middle = v / 3.0f + 0.5f;
    return g * (v < zero - 3.0f ? zero : v <= zero + 3.0f ? middle : one);
  }
  if constexpr (kAct == Act::Silu) {
    const Vec gate = one / (one + exponential<kLanes>(-v));
    return g * (gate * (one + v * (one - gate)));
  }
  return g;
}

// A block of channels of one sample.
class Task {
 public:
  Task(const EpilogueGrad& p, int64_t n, int64_t channel)
      : p_(p), n_(n), channel_(channel), count_(std::min(kBlock, p.channels[n] - channel)) {
    padded_ = (count_ + kLanes - 1) / kLanes * kLanes;
    const int64_t row = (p.table_row != nullptr ? p.table_row[n] : 0) * p.table_stride + channel;
    for (int64_t c = 0; c < padded_; ++c) {
      scale_[c] = p.scale != nullptr && c < count_ ? p.scale[row + c] : 1.0f;
      shift_[c] = p.shift != nullptr && c < count_ ? p.shift[row + c] : 0.0f;
    }
  }

  void run() {
    for (int64_t y = 0; y < p_.g.h; ++y)
      for (int64_t x = 0; x < p_.g.w; x += kPixels) {
        const int64_t pixels = std::min(kPixels, p_.g.w - x);
        load(p_.gy, y, x, pixels, gy_);
        if (p_.act == Act::Relu || p_.act == Act::Relu6) load(p_.y, y, x, pixels, y_);
        if (p_.z.data != nullptr) load(p_.z, y, x, pixels, z_);
        switch (p_.act) {
          case Act::None:
            piece<Act::None>(pixels);
            break;
          case Act::Relu:
            piece<Act::Relu>(pixels);
            break;
          case Act::Relu6:
            piece<Act::Relu6>(pixels);
            break;
          case Act::Hardswish:
            piece<Act::Hardswish>(pixels);
            break;
          case Act::Silu:
            piece<Act::Silu>(pixels);
            break;
        }
        float* to = static_cast<float*>(p_.g.data) + n_ * p_.g.sn + y * p_.g.sh + x * p_.g.sw + channel_;
        for (int64_t i = 0; i < pixels; ++i, to += p_.g.sw) std::copy_n(gy_ + i * kBlock, count_, to);
      }
  }

 private:
  void load(const Activation& from, int64_t y, int64_t x, int64_t pixels, float* to) const {
    Activation t = from;
    t.data = static_cast<char*>(from.data) + x * from.sw * dtype_size(from.dtype);
    stage_row(t, n_, y, pixels, channel_, count_, padded_, kBlock, to);
  }

  // Leaves the gradient in the place of gy_. A piece is summed in fp32, pieces in fp64.
  template <Act kAct>
  void piece(int64_t pixels) {
    using L = Lanes<kLanes>;
    for (int64_t c = 0; c < padded_; c += kLanes) {
      const Vec scale = L::load(scale_ + c), shift = L::load(shift_ + c);
      Vec sum{}, sum_z{};
      for (int64_t i = c; i < pixels * kBlock; i += kBlock) {
        const Vec z = L::load(z_ + i), g = back<kAct>(L::load(gy_ + i), L::load(y_ + i), z * scale + shift);
        sum += g, sum_z += g * z;
        L::save(gy_ + i, g * scale);
      }
      for (int64_t k = 0; k < std::min<int64_t>(kLanes, count_ - c); ++k) {
        if (p_.sums != nullptr) p_.sums[n_ * p_.g.c + channel_ + c + k] += static_cast<double>(sum[k]);
        if (p_.sums_z != nullptr) p_.sums_z[n_ * p_.g.c + channel_ + c + k] += static_cast<double>(sum_z[k]);
      }
    }
  }

  const EpilogueGrad& p_;
  int64_t n_, channel_, count_, padded_;
  float scale_[kBlock], shift_[kBlock], gy_[kPixels * kBlock];
  float y_[kPixels * kBlock] = {}, z_[kPixels * kBlock] = {};
};

}  // namespace

void epilogue_grad(const EpilogueGrad& p) {
  for (double* sums : {p.sums, p.sums_z})
    if (sums != nullptr) std::fill_n(sums, p.g.n * p.g.c, 0.0);
  const int64_t blocks = (p.g.c + kBlock - 1) / kBlock;
  parallel_for(0, p.g.n * blocks, 1 + kTask / (kBlock * p.g.h * p.g.w + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (i % blocks * kBlock < p.channels[i / blocks]) Task(p, i / blocks, i % blocks * kBlock).run();
  });
}

}  // namespace effkern::conv
