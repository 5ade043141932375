#include "item.h"

#include <cstring>

namespace effkern::conv {

namespace {

// A line of `width` pixels from kChannels planes, side by side.
template <int kChannels>
void weave(const float* from, int64_t plane, int64_t width, float* to) {
  for (int64_t ix = 0; ix < width; ++ix)
    for (int c = 0; c < kChannels; ++c) to[ix * kChannels + c] = from[c * plane + ix];
}

// A line of `width` pixels, its first at element `from` of x. Channels-last sources are read along channels, all others
// along the line, so that one side of the copy is always contiguous.
void copy_line(const Activation& x, int64_t from, int64_t width, int64_t channels, float* to, int64_t pitch) {
  if (x.sc == 1 && x.dtype == DType::F32) {
    const float* line = static_cast<const float*>(x.data) + from;
    if (x.sw == pitch && pitch == channels) {
      std::memcpy(to, line, width * channels * sizeof(float));
      return;
    }
    for (int64_t ix = 0; ix < width; ++ix) std::memcpy(to + ix * pitch, line + ix * x.sw, channels * sizeof(float));
  } else if (x.sc == 1) {
    for (int64_t ix = 0; ix < width; ++ix)
      for (int64_t c = 0; c < channels; ++c) to[ix * pitch + c] = load_float(x.data, x.dtype, from + ix * x.sw + c);
  } else if (x.dtype == DType::F32 && x.sw == 1 && channels == 3 && pitch == 3) {
    weave<3>(static_cast<const float*>(x.data) + from, x.sc, width, to);  // an image
  } else if (x.dtype == DType::F32) {
    for (int64_t c = 0; c < channels; ++c) {
      const float* plane = static_cast<const float*>(x.data) + from + c * x.sc;
      for (int64_t ix = 0; ix < width; ++ix) to[ix * pitch + c] = plane[ix * x.sw];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t ix = 0; ix < width; ++ix)
        to[ix * pitch + c] = load_float(x.data, x.dtype, from + c * x.sc + ix * x.sw);
  }
}

}  // namespace

void stage(const Problem& p, const Plan& plan, const Item& item, float* out) {
  const Activation& x = p.x;
  const int64_t y0 = first_in_row(p, item), y1 = std::min(x.h, y0 + plan.in_rows);
  const int64_t pitch = plan.stage_pitch, line = plan.stage_width * pitch;
  const int64_t left = std::min(plan.stage_left, plan.stage_width), width = std::min(x.w, plan.stage_width - left);
  for (int64_t s = 0; s < item.samples; ++s) {
    const int64_t n = x_row(p, item.first + s);
    for (int64_t iy = y0; iy < y1; ++iy) {
      float* to = out + (s * plan.in_rows + iy - y0) * line;
      std::fill(to, to + left * pitch, 0.0f);
      copy_line(x, n * x.sn + iy * x.sh, width, p.c_in, to + left * pitch, pitch);
      std::fill(to + (left + width) * pitch, to + line, 0.0f);
    }
  }
}

}  // namespace effkern::conv
