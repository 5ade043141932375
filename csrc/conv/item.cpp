#include "item.h"

#include <cstring>

namespace effkern::conv {

// Channel-last sources are read along channels, all others along the row, so that one side of the copy is always
// contiguous.
void stage(const Problem& p, const Plan& plan, const Item& item, float* out) {
  const Activation& x = p.x;
  const int64_t y0 = first_in_row(p, item), y1 = std::min(x.h, y0 + plan.in_rows);
  const int64_t pitch = plan.stage_pitch, line = x.w * pitch;
  for (int64_t s = 0; s < item.samples; ++s) {
    const int64_t n = x_row(p, item.first + s);
    for (int64_t iy = y0; iy < y1; ++iy) {
      float* to = out + (s * plan.in_rows + iy - y0) * line;
      const int64_t from = n * x.sn + iy * x.sh;
      if (x.sc == 1 && x.dtype == DType::F32) {
        for (int64_t ix = 0; ix < x.w; ++ix)
          std::memcpy(to + ix * pitch, static_cast<const float*>(x.data) + from + ix * x.sw, p.c_in * sizeof(float));
      } else if (x.sc == 1) {
        for (int64_t ix = 0; ix < x.w; ++ix)
          for (int64_t c = 0; c < p.c_in; ++c) to[ix * pitch + c] = load_float(x.data, x.dtype, from + ix * x.sw + c);
      } else {
        for (int64_t c = 0; c < p.c_in; ++c)
          for (int64_t ix = 0; ix < x.w; ++ix)
            to[ix * pitch + c] = load_float(x.data, x.dtype, from + c * x.sc + ix * x.sw);
      }
    }
  }
}

}  // namespace effkern::conv
