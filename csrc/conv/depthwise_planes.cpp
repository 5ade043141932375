// Maps that lie plane by plane. A band of one channel is copied into padded rows, split by the phases of the stride:
// then every tap is the same run of consecutive floats at another offset, for all rows at once, and a vector holds 16
// pixels even of a map 7 wide.

#include "depthwise.h"
#include "item.h"

namespace effkern::conv {
namespace {

constexpr int64_t kBandFloats = 24 * 1024 / 4;  // input and output of a band: within a 32 KiB L1
constexpr int64_t kMostFloats = 64 * 1024 / 4;  // of a single row's input, else the kernel reaches too far
constexpr int64_t kOverrun = 64;                // vectors run past the last pixel

// Rows (or columns) that a phase of `outputs` outputs holds.
int64_t phase_size(const Problem& p, int axis, int64_t outputs) {
  const int64_t kernel = axis == 0 ? p.kh : p.kw;
  return outputs + (kernel - 1) * p.dil[axis] / p.stride[axis];
}

// Phases that some tap falls on, at most.
int64_t phases(const Problem& p, int axis) { return std::min(axis == 0 ? p.kh : p.kw, p.stride[axis]); }

// Floats of a band's input; huge if they could not be counted.
double input_floats(const Problem& p, int64_t rows) {
  return static_cast<double>(phases(p, 0) * phases(p, 1)) * static_cast<double>(phase_size(p, 0, rows)) *
         static_cast<double>(phase_size(p, 1, p.y.w));
}

int64_t out_floats(const Problem& p, int64_t rows) { return rows * phase_size(p, 1, p.y.w) + kOverrun; }

// First and one past the last position i >= 0, i < size, for which origin + i * stride is in [0, extent).
struct Range {
  int64_t begin, end;
};
Range inside(int64_t origin, int64_t stride, int64_t extent, int64_t size) {
  const int64_t begin = origin >= 0 ? 0 : (-origin + stride - 1) / stride;
  const int64_t end = origin >= extent ? 0 : (extent - 1 - origin) / stride + 1;
  return {std::min(begin, size), std::clamp(end, std::min(begin, size), size)};
}

}  // namespace

bool DepthwisePlanes::fits(const Problem& p) {
  return (p.x.sc != 1 || p.c_out == 1) && input_floats(p, 1) <= kMostFloats && p.kh * p.kw <= kMostFloats;
}

int64_t DepthwisePlanes::band_rows(const Problem& p) {
  int64_t rows = p.y.h;
  while (rows > 1 && input_floats(p, rows) + static_cast<double>(out_floats(p, rows)) > kBandFloats)
    rows = (rows + 1) / 2;
  return rows;
}

size_t DepthwisePlanes::scratch_bytes(const Problem& p) {
  const int64_t rows = band_rows(p);
  size_t bytes = Arena::bytes(p.kh * p.kw, sizeof(int64_t)) + Arena::bytes(phases(p, 0), sizeof(int64_t)) +
                 Arena::bytes(phases(p, 1), sizeof(int64_t));
  bytes += Arena::bytes(static_cast<size_t>(input_floats(p, rows)) + kOverrun, sizeof(float));
  return bytes + 2 * Arena::bytes(out_floats(p, rows), sizeof(float));
}

DepthwisePlanes::DepthwisePlanes(const Problem& p, Arena& arena)
    : p_(p),
      k_(depthwise_kernels(isa())),
      rows_(band_rows(p)),
      pitch_(phase_size(p, 1, p.y.w)),
      in_rows_(phase_size(p, 0, rows_)),
      row_phases_(0),
      column_phases_(0) {
  offset_ = arena.take<int64_t>(p.kh * p.kw);
  row_phase_ = arena.take<int64_t>(phases(p, 0));
  column_phase_ = arena.take<int64_t>(phases(p, 1));
  const auto x_floats = static_cast<size_t>(input_floats(p, rows_)) + kOverrun;
  x_ = arena.take<float>(x_floats);
  out_ = arena.take<float>(out_floats(p, rows_));
  added_ = arena.take<float>(out_floats(p, rows_));
  std::fill(x_, x_ + x_floats, 0.0f);  // the padding's columns stay so
  std::fill(added_, added_ + out_floats(p, rows_), 0.0f);
  const auto index_of = [](int64_t phase, int64_t* list, int64_t& count) {
    for (int64_t i = 0; i < count; ++i)
      if (list[i] == phase) return i;
    list[count] = phase;
    return count++;
  };
  const int64_t columns = phases(p, 1);
  for (int64_t ky = 0; ky < p.kh; ++ky) {
    const int64_t dy = ky * p.dil[0], row_phase = index_of(dy % p.stride[0], row_phase_, row_phases_);
    for (int64_t kx = 0; kx < p.kw; ++kx) {
      const int64_t dx = kx * p.dil[1], column_phase = index_of(dx % p.stride[1], column_phase_, column_phases_);
      offset_[ky * p.kw + kx] =
          (row_phase * columns + column_phase) * in_rows_ * pitch_ + dy / p.stride[0] * pitch_ + dx / p.stride[1];
    }
  }
}

void DepthwisePlanes::load_phase(const DepthwiseBand& band, int64_t channel, int64_t row_phase, int64_t column_phase,
                                 float* to) {
  const Activation& x = p_.x;
  const int64_t sy = p_.stride[0], sx = p_.stride[1];
  const int64_t iy = band.row * sy - p_.pad[0] + row_phase_[row_phase], ix = column_phase_[column_phase] - p_.pad[1];
  const Range rows = inside(iy, sy, x.h, phase_size(p_, 0, band.rows)), columns = inside(ix, sx, x.w, pitch_);
  for (int64_t r = 0; r < in_rows_; ++r)
    if (r < rows.begin || r >= rows.end) std::fill(to + r * pitch_, to + (r + 1) * pitch_, 0.0f);
  if (rows.begin == rows.end || columns.begin == columns.end) return;
  const int64_t n = x_row(p_, band.sample);
  const int64_t from = n * x.sn + channel * x.sc + (iy + rows.begin * sy) * x.sh + (ix + columns.begin * sx) * x.sw;
  float* first = to + rows.begin * pitch_ + columns.begin;
  const int64_t height = rows.end - rows.begin, width = columns.end - columns.begin;
  if (x.dtype == DType::F32 && x.sw * sx == 1)
    return k_.copy(first, pitch_, static_cast<const float*>(x.data) + from, sy * x.sh, height, width);
  if (x.dtype == DType::F32 && x.sw * sx == 2)
    return k_.evens(first, pitch_, static_cast<const float*>(x.data) + from, sy * x.sh, height, width);
  for (int64_t r = 0; r < height; ++r)
    for (int64_t c = 0; c < width; ++c)
      first[r * pitch_ + c] = load_float(x.data, x.dtype, from + r * sy * x.sh + c * sx * x.sw);
}

void DepthwisePlanes::load(const DepthwiseBand& band, int64_t channel) {
  for (int64_t r = 0; r < row_phases_; ++r)
    for (int64_t c = 0; c < column_phases_; ++c)
      load_phase(band, channel, r, c, x_ + (r * phases(p_, 1) + c) * in_rows_ * pitch_);
}

void DepthwisePlanes::operator()(const DepthwiseBand& band, const DepthwiseTarget& target) {
  const Epilogue& e = p_.epilogue;
  const Activation &y = target.to, *residual = e.residual;
  const int64_t xn = x_row(p_, band.sample);
  const int64_t rn = residual_row(p_, band.sample);
  const int64_t table = e.table_row != nullptr ? e.table_row[xn] * e.table_stride : 0;
  DepthwiseFlat f;
  f.x = x_, f.offset = offset_, f.out = out_;
  f.taps = p_.kh * p_.kw, f.tap_stride = p_.depthwise_stride;
  f.residual = residual != nullptr ? added_ : nullptr;
  f.length = ((band.rows - 1) * pitch_ + p_.y.w + kFlatLanes - 1) / kFlatLanes * kFlatLanes;
  f.epilogue = depthwise_epilogue(e.act);
  for (int64_t channel = band.channel; channel < band.channel + band.channels; ++channel) {
    load(band, channel);
    if (residual != nullptr) {
      const int64_t from = rn * residual->sn + channel * residual->sc + band.row * residual->sh;
      if (residual->dtype == DType::F32 && residual->sw == 1) {
        k_.copy(added_, pitch_, static_cast<const float*>(residual->data) + from, residual->sh, band.rows, p_.y.w);
      } else {
        for (int64_t r = 0; r < band.rows; ++r)
          for (int64_t c = 0; c < p_.y.w; ++c)
            added_[r * pitch_ + c] =
                load_float(residual->data, residual->dtype, from + r * residual->sh + c * residual->sw);
      }
    }
    f.weight = p_.depthwise + channel;
    f.scale = e.scale != nullptr ? e.scale[table + channel] : 1.0f;
    f.shift = e.shift != nullptr ? e.shift[table + channel] : 0.0f;
    k_.flat(f);
    const int64_t to = target.sample * y.sn + channel * y.sc + (band.row - target.first_row) * y.sh;
    if (y.dtype == DType::F32 && y.sw == 1) {
      k_.copy(static_cast<float*>(y.data) + to, y.sh, out_, pitch_, band.rows, p_.y.w);
      continue;
    }
    for (int64_t r = 0; r < band.rows; ++r)
      for (int64_t c = 0; c < p_.y.w; ++c) store_float(y.data, y.dtype, to + r * y.sh + c * y.sw, out_[r * pitch_ + c]);
  }
}

}  // namespace effkern::conv
