#include "pack.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "../common/parallel.h"
#include "ukernel.h"

namespace effkern::conv {
namespace {

uint64_t fnv1a(const void* data, size_t size) {
  uint64_t hash = 1469598103934665603u;
  for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  return hash;
}

int64_t bias_floats(const PackHeader& h) { return h.has_bias != 0 ? panels_of(h.out_channels) * kPanel : 0; }

WeightView packed_view(const PackHeader& h) {
  WeightView view;
  view.groups = h.groups;
  view.out_per_group = h.out_channels / h.groups;
  view.in_per_group = h.in_per_group;
  view.kh = h.kh;
  view.kw = h.kw;
  return view;
}

int64_t weight_floats(const PackHeader& h) {
  return h.kind == PackKind::Depthwise ? depthwise_floats(packed_view(h)) : panels_floats(packed_view(h));
}

int64_t transforms_floats(const PackHeader& h) {
  return h.kind == PackKind::Winograd ? winograd_floats(packed_view(h)) : 0;
}

}  // namespace

bool is_countable(const WeightView& w) {
  const int64_t out = (w.out_per_group + kPanel) * w.groups;  // padded to panels
  int64_t floats = 0;
  return !__builtin_mul_overflow(w.kh, w.kw, &floats) && !__builtin_mul_overflow(floats, out, &floats) &&
         !__builtin_mul_overflow(floats, std::max<int64_t>(w.in_per_group, 1), &floats) && floats <= (int64_t{1} << 58);
}

int64_t panels_floats(const WeightView& w) {
  return w.groups * panels_of(w.out_per_group) * w.kh * w.kw * w.in_per_group * kPanel;
}

int64_t winograd_floats(const WeightView& w) {
  return w.groups * panels_of(w.out_per_group) * kWinogradValues * w.in_per_group * kPanel;
}

int64_t depthwise_floats(const WeightView& w) { return w.kh * w.kw * w.groups; }

namespace {

// One panel: every 16-float line is gathered from 16 output rows and written once.
template <class Load>
void pack_panel(const WeightView& w, int64_t group, int64_t first, float* panel, Load load) {
  const int64_t lanes = std::min(kPanel, w.out_per_group - first), from = group * w.group_stride + first * w.so;
  for (int64_t i = 0; i < w.in_per_group; ++i) {
    for (int64_t t = 0; t < w.kh * w.kw; ++t) {
      float* line = panel + (t * w.in_per_group + i) * kPanel;
      const int64_t at = from + i * w.si + t / w.kw * w.sh + t % w.kw * w.sw;
      for (int64_t lane = 0; lane < lanes; ++lane) line[lane] = load(at + lane * w.so);
      for (int64_t lane = lanes; lane < kPanel; ++lane) line[lane] = 0;
    }
  }
}

}  // namespace

void pack_panels(const WeightView& w, float* out) {
  const int64_t per_group = panels_of(w.out_per_group), panel_floats = w.kh * w.kw * w.in_per_group * kPanel;
  parallel_for(0, w.groups * per_group, 1 + 16384 / (panel_floats + 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t group = p / per_group, first = p % per_group * kPanel;
      float* panel = out + p * panel_floats;
      if (w.dtype == DType::F32)
        pack_panel(w, group, first, panel, [&](int64_t i) { return static_cast<const float*>(w.data)[i]; });
      else
        pack_panel(w, group, first, panel, [&](int64_t i) { return load_float(w.data, w.dtype, i); });
    }
  });
}

void pack_winograd(const WeightView& w, const float* panels, float* out) {
  const WinogradKernels& f = kernels(isa()).f43;
  const int64_t plane = w.in_per_group * kPanel, rows = 2 * f.weight_side * plane;
  parallel_for(0, w.groups * panels_of(w.out_per_group), 1 + 4096 / (plane + 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t pair = 0; pair < f.pairs; ++pair)
        f.weight(pair, panels + p * 9 * plane, plane, w.in_per_group, out + p * kWinogradValues * plane + pair * rows,
                 plane);
  });
}

void pack_depthwise(const WeightView& w, float* out) {
  for (int64_t t = 0; t < w.kh * w.kw; ++t)
    for (int64_t c = 0; c < w.groups; ++c)
      out[t * w.groups + c] = load_float(w.data, w.dtype, c * w.group_stride + t / w.kw * w.sh + t % w.kw * w.sw);
}

PackHeader make_header(PackKind kind, bool has_bias, int64_t out_channels, int64_t in_per_group, int64_t kh, int64_t kw,
                       int64_t groups) {
  PackHeader h{};
  std::memcpy(h.magic, "EFFKPACK", 8);
  h.version = kPackVersion;
  h.kind = kind;
  h.has_bias = has_bias ? 1 : 0;
  h.out_channels = static_cast<int32_t>(out_channels);
  h.in_per_group = static_cast<int32_t>(in_per_group);
  h.kh = static_cast<int32_t>(kh);
  h.kw = static_cast<int32_t>(kw);
  h.groups = static_cast<int32_t>(groups);
  h.checksum = fnv1a(&h, offsetof(PackHeader, checksum));
  return h;
}

const char* check_header(const void* bytes, int64_t size) {
  if (size < static_cast<int64_t>(sizeof(PackHeader))) return "is shorter than its 64-byte header";
  PackHeader h;
  std::memcpy(&h, bytes, sizeof h);
  if (std::memcmp(h.magic, "EFFKPACK", 8) != 0) return "does not begin with the magic bytes of a packed weight";
  if (h.version != kPackVersion) return "has a format version this build does not read";
  if (h.checksum != fnv1a(&h, offsetof(PackHeader, checksum))) return "has a corrupt header (checksum differs)";
  if (h.kind != PackKind::Panels && h.kind != PackKind::Depthwise && h.kind != PackKind::Winograd)
    return "has an unknown kind of pack";
  if (h.out_channels < 0 || h.in_per_group < 0 || h.kh < 1 || h.kw < 1 || h.groups < 1 ||
      h.out_channels % h.groups != 0)
    return "has impossible dimensions in its header";
  if ((h.kind == PackKind::Depthwise) != is_depthwise(h.out_channels, h.in_per_group, h.groups) ||
      (h.kind == PackKind::Winograd && (h.kh != 3 || h.kw != 3)))
    return "has a kind of pack that does not fit the dimensions in its header";
  if (!is_countable(packed_view(h)) || handle_bytes(h) != size)
    return "has a size other than its header tells (truncated?)";
  return nullptr;
}

int64_t handle_weight_offset(const PackHeader& h) {
  return static_cast<int64_t>(sizeof(PackHeader)) + bias_floats(h) * 4;
}

int64_t handle_transforms_offset(const PackHeader& h) { return handle_weight_offset(h) + weight_floats(h) * 4; }

int64_t handle_bytes(const PackHeader& h) { return handle_transforms_offset(h) + transforms_floats(h) * 4; }

}  // namespace effkern::conv
