// Guarded, poisoned tensors and the convolution in double, one multiply-add after the other.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "../conv/problem.h"
#include "guarded.h"

namespace effkern::test {

using conv::Act;
using conv::Activation;

enum class Layout { Nhwc, Nchw, Hwcn };

inline std::mt19937& rng() {
  static std::mt19937 engine(20260101);
  return engine;
}
inline int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(rng()); }
inline float normal() { return std::normal_distribution<float>()(rng()); }
inline bool coin() { return draw(0, 1) == 1; }

// A tensor whose buffer holds `extra` channels more than the `c` it shows, in the middle of which it may begin. The
// buffer ends with the last element shown, and everything not shown is NaN.
class Buffer {
 public:
  Buffer(DType dtype, Layout layout, int64_t n, int64_t c, int64_t h, int64_t w, int64_t extra = 0)
      : size_(span(layout, n, c, h, w, c + extra, view_)), memory_(static_cast<size_t>(size_ * dtype_size(dtype))) {
    view_.data = memory_.data();
    view_.dtype = dtype;
    view_.n = n;
    view_.c = c;
    view_.h = h;
    view_.w = w;
    fill(std::numeric_limits<float>::quiet_NaN());
  }

  const Activation& view() const { return view_; }
  int64_t size() const { return size_; }
  int64_t index(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return n * view_.sn + c * view_.sc + h * view_.sh + w * view_.sw;
  }
  float get(int64_t i) const { return load_float(view_.data, view_.dtype, i); }
  float at(int64_t n, int64_t c, int64_t h, int64_t w) const { return get(index(n, c, h, w)); }
  void set(int64_t i, float value) { store_float(view_.data, view_.dtype, i, value); }
  void fill(float value) {
    for (int64_t i = 0; i < size_; ++i) set(i, value);
  }
  // Normal numbers in the first `channels` channels.
  void randomize(int64_t channels) {
    for (int64_t n = 0; n < view_.n; ++n)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t h = 0; h < view_.h; ++h)
          for (int64_t w = 0; w < view_.w; ++w) set(index(n, c, h, w), normal());
  }

 private:
  static int64_t span(Layout layout, int64_t n, int64_t c, int64_t h, int64_t w, int64_t pitch, Activation& v) {
    if (layout == Layout::Nhwc) {
      v.sc = 1, v.sw = pitch, v.sh = pitch * w, v.sn = pitch * w * h;
    } else if (layout == Layout::Nchw) {
      v.sw = 1, v.sh = w, v.sc = w * h, v.sn = pitch * w * h;
    } else {
      v.sn = 1, v.sc = n, v.sw = pitch * n, v.sh = pitch * n * w;
    }
    if (n == 0 || c == 0 || h == 0 || w == 0) return 0;
    return (n - 1) * v.sn + (c - 1) * v.sc + (h - 1) * v.sh + (w - 1) * v.sw + 1;
  }

  Activation view_;
  int64_t size_;
  Guarded memory_;
};

// A dense weight [out][in_per_group][kh][kw]; outputs are ordered by group.
struct Weight {
  int64_t out, in_per_group, kh, kw;
  DType dtype;
  Guarded memory;
  Weight(int64_t out, int64_t in_per_group, int64_t kh, int64_t kw, DType dtype)
      : out(out),
        in_per_group(in_per_group),
        kh(kh),
        kw(kw),
        dtype(dtype),
        memory(static_cast<size_t>(out * in_per_group * kh * kw * dtype_size(dtype))) {
    for (int64_t i = 0; i < out * in_per_group * kh * kw; ++i) store_float(memory.data(), dtype, i, normal());
  }
  float at(int64_t o, int64_t i, int64_t y, int64_t x) const {
    return load_float(memory.data(), dtype, ((o * in_per_group + i) * kh + y) * kw + x);
  }
};

inline double activate(double v, Act act) {
  switch (act) {
    case Act::None:
      return v;
    case Act::Relu:
      return std::fmax(v, 0.0);
    case Act::Relu6:
      return std::fmin(std::fmax(v, 0.0), 6.0);
    case Act::Hardswish:
      return v * std::fmin(std::fmax(v + 3.0, 0.0), 6.0) / 6.0;
    case Act::Silu:
      return v / (1.0 + std::exp(-v));
  }
  return v;
}

// Largest error allowed where the exact value is `exact` and the sum of the magnitudes of all terms is `magnitude`:
// 16 u for the sum, slopes of the activations up to 1.5, some u for exp and division, one rounding of the output.
inline double allowed(double exact, double magnitude, DType dtype, Act act) {
  const double u = 0x1p-24, output = dtype == DType::F32 ? 0.0 : dtype == DType::BF16 ? 0x1p-8 : 0x1p-11;
  const double slope = act == Act::None || act == Act::Relu || act == Act::Relu6 ? 1.0 : 1.5;
  const double subnormal = dtype == DType::F16 ? 0x1p-25 : 0.0;
  return slope * 16 * u * magnitude + 16 * u * std::fabs(exact) + output * std::fabs(exact) + subnormal;
}

}  // namespace effkern::test
