#include "act_grad.h"

#include "../common/parallel.h"

namespace effkern::conv {
namespace {

// Elements a task should have: 5 us of copying, as much as a second thread's wake-up costs.
constexpr int64_t kTask = 1 << 14;

}  // namespace

void relu_grad(const Activation& gy, const Activation& y, Act act, const Activation& gz) {
  // As in torch a NaN output lets the gradient through; nothing is greater than the bound that relu does not have.
  const float most = act == Act::Relu6 ? 6.0f : __builtin_nanf("");
  const bool last = gz.sc == 1;  // channels or columns innermost, as gz lies
  const int64_t inner = last ? gz.c : gz.w, outer = last ? gz.w : gz.c;
  const int64_t gy_in = last ? gy.sc : gy.sw, y_in = last ? y.sc : y.sw, gz_in = last ? gz.sc : gz.sw;
  const int64_t gy_out = last ? gy.sw : gy.sc, y_out = last ? y.sw : y.sc, gz_out = last ? gz.sw : gz.sc;
  const bool plain = gy.dtype == DType::F32 && y.dtype == DType::F32 && gz.dtype == DType::F32;
  const auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t o = 0; o < outer; ++o) {
        const int64_t a = r / gz.h * gy.sn + r % gz.h * gy.sh + o * gy_out;
        const int64_t b = r / gz.h * y.sn + r % gz.h * y.sh + o * y_out;
        const int64_t c = r / gz.h * gz.sn + r % gz.h * gz.sh + o * gz_out;
        if (plain) {
          const float *g = static_cast<const float*>(gy.data) + a, *v = static_cast<const float*>(y.data) + b;
          float* to = static_cast<float*>(gz.data) + c;
          if (gy_in == 1 && y_in == 1 && gz_in == 1)
            for (int64_t i = 0; i < inner; ++i) to[i] = v[i] <= 0 || v[i] >= most ? 0.0f : g[i];
          else
            for (int64_t i = 0; i < inner; ++i)
              to[i * gz_in] = v[i * y_in] <= 0 || v[i * y_in] >= most ? 0.0f : g[i * gy_in];
          continue;
        }
        for (int64_t i = 0; i < inner; ++i) {
          const float v = load_float(y.data, y.dtype, b + i * y_in);
          const float g = load_float(gy.data, gy.dtype, a + i * gy_in);
          store_float(gz.data, gz.dtype, c + i * gz_in, v <= 0 || v >= most ? 0.0f : g);
        }
      }
  };
  const int64_t row = gz.c * gz.w, all = gz.n * gz.h;
  if (all * row < 2 * kTask) return rows(0, all);
  parallel_for(0, all, 1 + kTask / (row + 1), rows);
}

}  // namespace effkern::conv
