#include "mean.h"

#include <algorithm>

#include "depthwise.h"
#include "item.h"

namespace effkern::conv {
namespace {

constexpr int64_t kBlock = 64;  // channels summed at a time: sixteen vectors of SSE2

// Channels [channel, channel + channels) of the window at (iy, ix), clipped to the map.
void average(const Mean& m, int64_t sample, int64_t oy, int64_t ox, int64_t channel, int64_t channels, float* total) {
  const Activation& x = m.x;
  const int64_t y0 = oy * m.stride[0], y1 = std::min(x.h, y0 + m.kernel[0]);
  const int64_t x0 = ox * m.stride[1], x1 = std::min(x.w, x0 + m.kernel[1]);
  const bool plain = is_plain(x);
  std::fill_n(total, kBlock, 0.0f);
  for (int64_t iy = y0; iy < y1; ++iy) {
    float line[kBlock] = {};
    for (int64_t ix = x0; ix < x1; ++ix) {
      const int64_t from = sample * x.sn + iy * x.sh + ix * x.sw + channel * x.sc;
      if (plain) {
        const float* pixel = static_cast<const float*>(x.data) + from;
        for (int64_t c = 0; c < channels; ++c) line[c] += pixel[c];
      } else {
        for (int64_t c = 0; c < channels; ++c) line[c] += load_float(x.data, x.dtype, from + c * x.sc);
      }
    }
    for (int64_t c = 0; c < channels; ++c) total[c] += line[c];
  }
  const auto count = static_cast<float>((y1 - y0) * (x1 - x0));
  for (int64_t c = 0; c < channels; ++c) total[c] /= count;
}

}  // namespace

int64_t mean_size(int64_t in, int64_t kernel, int64_t stride, bool up) {
  const int64_t room = in - kernel + (up ? stride - 1 : 0);
  if (in == 0 || room < 0) return 0;
  const int64_t size = room / stride + 1;
  return up && (size - 1) * stride >= in ? size - 1 : size;  // a window begins on the map
}

Step mean_step(const Mean& mean) {
  const int64_t blocks = (mean.y.c + kBlock - 1) / kBlock;
  return {mean.y.n * mean.y.h * blocks, [m = mean, blocks](int64_t begin, int64_t end) {
            float total[kBlock];
            for (int64_t unit = begin; unit < end; ++unit) {
              const int64_t sample = unit / blocks / m.y.h, oy = unit / blocks % m.y.h;
              const int64_t channel = unit % blocks * kBlock, channels = std::min(kBlock, m.y.c - channel);
              for (int64_t ox = 0; ox < m.y.w; ++ox) {
                average(m, sample, oy, ox, channel, std::clamp<int64_t>(m.x.c - channel, 0, channels), total);
                const int64_t to = sample * m.y.sn + oy * m.y.sh + ox * m.y.sw + channel * m.y.sc;
                for (int64_t c = 0; c < channels; ++c) store_float(m.y.data, m.y.dtype, to + c * m.y.sc, total[c]);
              }
            }
          }};
}

}  // namespace effkern::conv
