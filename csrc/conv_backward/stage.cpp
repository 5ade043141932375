#include "stage.h"

#include <algorithm>
#include <cstring>

namespace effkern::conv {

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

void transpose(const float* from, int64_t from_step, float* to, int64_t pitch) {
  const auto load = [&](int64_t i) { return *reinterpret_cast<const Four*>(from + i * from_step); };
  const Four a = load(0), b = load(1), c = load(2), d = load(3);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four ef = __builtin_shufflevector(a, b, 2, 6, 3, 7), gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const auto save = [&](int64_t i, Four v) { *reinterpret_cast<Four*>(to + i * pitch) = v; };
  save(0, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  save(1, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  save(2, __builtin_shufflevector(ef, gh, 0, 1, 4, 5));
  save(3, __builtin_shufflevector(ef, gh, 2, 3, 6, 7));
}

namespace {

void copy_floats(const Activation& t, const float* from, int64_t columns, int64_t channels, int64_t pitch, float* out) {
  if (t.sc == 1) {
    for (int64_t x = 0; x < columns; ++x, from += t.sw, out += pitch) {
      int64_t c = 0;
      for (; c + 4 <= channels; c += 4) *reinterpret_cast<Four*>(out + c) = *reinterpret_cast<const Four*>(from + c);
      for (; c < channels; ++c) out[c] = from[c];
    }
    return;
  }
  int64_t c = 0;
  if (t.sw == 1)
    for (; c + 4 <= channels; c += 4) {
      int64_t x = 0;
      for (; x + 4 <= columns; x += 4) transpose(from + c * t.sc + x, t.sc, out + x * pitch + c, pitch);
      for (; x < columns; ++x)
        for (int64_t i = c; i < c + 4; ++i) out[x * pitch + i] = from[i * t.sc + x];
    }
  for (; c < channels; ++c)
    for (int64_t x = 0; x < columns; ++x) out[x * pitch + c] = from[c * t.sc + x * t.sw];
}

}  // namespace

void stage_row(const Activation& t, int64_t n, int64_t y, int64_t columns, int64_t c, int64_t channels, int64_t padded,
               int64_t pitch, float* out) {
  const int64_t from = n * t.sn + y * t.sh + c * t.sc;
  if (t.dtype == DType::F32) {
    copy_floats(t, static_cast<const float*>(t.data) + from, columns, channels, pitch, out);
  } else if (t.sc == 1) {
    for (int64_t x = 0; x < columns; ++x)
      for (int64_t i = 0; i < channels; ++i) out[x * pitch + i] = load_float(t.data, t.dtype, from + x * t.sw + i);
  } else {
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t x = 0; x < columns; ++x)
        out[x * pitch + i] = load_float(t.data, t.dtype, from + i * t.sc + x * t.sw);
  }
  if (padded > channels)
    for (int64_t x = 0; x < columns; ++x)
      std::memset(out + x * pitch + channels, 0, static_cast<size_t>(padded - channels) * sizeof(float));
}

}  // namespace effkern::conv
