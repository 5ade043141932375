#include "access.h"

namespace effkern::multi_branch_bn {
namespace {

int64_t pixel_pitch(const Activation& a) {
  if (a.w > 1) return a.h == 1 || a.sh == a.w * a.sw ? a.sw : -1;
  return a.h > 1 ? a.sh : a.n > 1 ? a.sn : 1;
}

}  // namespace

Access::Access(const Activation& a, const Walk& walk, const Kernels& kernels, bool stream)
    : a_(a),
      walk_(&walk),
      kernels_(&kernels),
      pixel_(pixel_pitch(a)),
      even_(pixel_ >= 0 && (a.n <= 1 || a.sn == a.h * a.w * pixel_)),
      direct_(a.dtype == DType::F32 && (walk.interleaved ? even_ && (a.c == 1 || a.sc == 1) : pixel_ == 1)),
      stream_(stream && a.dtype == DType::F32),
      lines_(reinterpret_cast<uintptr_t>(a.data) % 64 == 0 && (walk.interleaved ? a.c : walk.plane) % 16 == 0) {}

// Calls run(element, count, step, at): `count` positions whose first element of channel s.c is `element` and which are
// `step` elements apart, `at` positions into the tile.
template <class Run>
void Access::runs(const Spot& s, Run run) const {
  const int64_t plane = walk_->plane;
  for (int64_t at = 0; at < s.pixels;) {
    const int64_t q = s.q + at, n = q / plane, p = q % plane, left = s.pixels - at;
    int64_t count = left, from = q * pixel_, step = pixel_;
    if (!even_ && pixel_ >= 0) {
      count = std::min(left, plane - p);
      from = n * a_.sn + p * pixel_;
    } else if (!even_) {
      count = std::min(left, a_.w - p % a_.w);
      from = n * a_.sn + p / a_.w * a_.sh + p % a_.w * a_.sw;
      step = a_.sw;
    }
    run(from + s.c * a_.sc, count, step, at);
    at += count;
  }
}

const float* Access::read(const Spot& s, float* buffer, int64_t* pitch, int64_t* ahead) const {
  *ahead = 0;
  if (direct_) {
    const int64_t at = offset(s.q);
    *pitch = walk_->interleaved ? pixel_ : a_.sn;
    if (walk_->interleaved)
      *ahead = std::max<int64_t>(4, kAhead / std::max<int64_t>(s.channels, 1)) * pixel_;
    else if (s.q + std::min(s.pixels, walk_->plane) < walk_->positions)
      *ahead = offset(s.q + std::min(s.pixels, walk_->plane)) - at;
    return static_cast<const float*>(a_.data) + at + s.c * a_.sc;
  }
  const char* data = static_cast<const char*>(a_.data);
  const int64_t size = dtype_size(a_.dtype);
  *pitch = walk_->interleaved ? s.channels : walk_->plane;
  runs(s, [&](int64_t from, int64_t count, int64_t step, int64_t at) {
    float* to = buffer + at * s.channels;
    const bool dense = s.channels == 1 || a_.sc == 1;
    if (dense && (count == 1 || step == s.channels)) {
      kernels_->widen(data + from * size, a_.dtype, count * s.channels, to);
    } else if (dense && s.channels > 1) {
      for (int64_t p = 0; p < count; ++p)
        kernels_->widen(data + (from + p * step) * size, a_.dtype, s.channels, to + p * s.channels);
    } else {
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t p = 0; p < count; ++p)
          to[p * s.channels + c] = load_float(data, a_.dtype, from + p * step + c * a_.sc);
    }
  });
  return buffer;
}

float* Access::place(const Spot& s, float* buffer, int64_t* pitch) const {
  if (direct_ && (lines_ || !stream_)) {
    *pitch = walk_->interleaved ? pixel_ : a_.sn;
    return static_cast<float*>(a_.data) + offset(s.q) + s.c * a_.sc;
  }
  *pitch = walk_->interleaved ? s.channels : walk_->plane;
  return buffer;
}

void Access::put(const float* from, int64_t count, int64_t to) const {
  if (stream_) return kernels_->stream(from, count, static_cast<float*>(a_.data) + to);
  kernels_->narrow(from, a_.dtype, count, static_cast<char*>(a_.data) + to * dtype_size(a_.dtype));
}

void Access::finish(const Spot& s, const float* buffer) const {
  if (direct_ && (lines_ || !stream_)) return;
  runs(s, [&](int64_t to, int64_t count, int64_t step, int64_t at) {
    const float* from = buffer + at * s.channels;
    if (step == s.channels) return put(from, count * s.channels, to);
    for (int64_t p = 0; p < count; ++p) put(from + p * s.channels, s.channels, to + p * step);
  });
}

}  // namespace effkern::multi_branch_bn
