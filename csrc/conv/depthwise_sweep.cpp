// 3x3 depthwise bands on sets with 32 registers: strips of rows over the whole width.
#include "depthwise.h"

namespace effkern::conv {

// Cuts the band into strips as wide as the map and evenly high; into tiles where the outputs go through scratch.
void DepthwiseRows::strips(const DepthwiseBand& band, const DepthwiseTarget& target, const Source& source) {
  const bool straight = is_straight(p_, target.to);
  const int64_t most = straight ? kSweepRows[p_.stride[0] - 1] : kDepthwiseRows;
  const int64_t columns = straight ? p_.y.w : kDepthwiseMaxCols, last = band.row + band.rows;
  for (int64_t row = band.row, rows; row < last; row += rows) {
    rows = (last - row - 1) / ((last - row - 1) / most + 1) + 1;
    for (int64_t column = 0; column < p_.y.w; column += columns)
      sweep(band, target, source, row, rows, column, std::min(columns, p_.y.w - column));
  }
}

// What the strips from input row `next` on read is fetched ahead where it is one run of memory.
const char* DepthwiseRows::ahead(const DepthwiseBand& band, int64_t next, int64_t floats) const {
  const Activation& x = p_.x;
  if (staged_ != nullptr || band.channels != x.sw || x.sh != x.w * x.sw || x.sn != x.h * x.sh) return nullptr;
  const int64_t from = x_row(p_, band.sample) * x.sn + std::max<int64_t>(next, 0) * x.sh;
  return from + floats <= x.n * x.sn ? static_cast<const char*>(x.data) + from * sizeof(float) : nullptr;
}

void DepthwiseRows::sweep(const DepthwiseBand& band, const DepthwiseTarget& target, const Source& source, int64_t row,
                          int64_t rows, int64_t column, int64_t columns) {
  const Epilogue& e = p_.epilogue;
  const Activation &y = target.to, *residual = e.residual;
  const int64_t stride = p_.stride[0], in_rows = (rows - 1) * stride + 3, iy = row * stride - p_.pad[0];
  DepthwiseSweep s;
  for (int64_t r = 0; r < in_rows; ++r) {
    const bool inside = iy + r >= 0 && iy + r < p_.x.h;
    s.in[r] = inside ? source.data + (iy + r - source.top) * source.row_pitch : zeros_;
    s.in_step[r] = inside ? source.pixel_pitch : 0;
  }
  s.first = column * stride - p_.pad[1], s.width = p_.x.w, s.columns = columns;
  const bool plain_y = is_plain(y);
  s.out = plain_y ? static_cast<float*>(y.data) + at(y, band, target.sample, row - target.first_row, column) : line_;
  s.out_row = plain_y ? y.sh : columns * band.channels, s.out_step = plain_y ? y.sw : band.channels;
  s.residual = nullptr, s.residual_row = s.residual_step = 0;
  if (residual != nullptr && is_plain(*residual)) {
    s.residual =
        static_cast<const float*>(residual->data) + at(*residual, band, residual_row(p_, band.sample), row, column);
    s.residual_row = residual->sh, s.residual_step = residual->sw;
  } else if (residual != nullptr) {
    load_residual(band, row, rows, column, columns);
    s.residual = added_, s.residual_row = columns * band.channels, s.residual_step = band.channels;
  }
  const int64_t table = table_at(p_, band);
  s.channels = band.channels;
  s.weight = p_.depthwise + band.channel, s.tap_stride = p_.depthwise_stride;
  s.scale = e.scale != nullptr ? e.scale + table : nullptr;
  s.shift = e.shift != nullptr ? e.shift + table : zeros_;
  s.epilogue = depthwise_epilogue(e.act);
  s.ahead = ahead(band, iy + in_rows, rows * stride * p_.x.w * panels_of(band.channels) * kPanel);
  s.stream = target.stream;
  k_.sweep[stride - 1][rows - 1](s);
  if (is_curve(e.act))
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < columns; ++j) k_.curve(s.out + r * s.out_row + j * s.out_step, band.channels, e.act);
  if (!plain_y) store(band, target, row, rows, column, columns);
}

}  // namespace effkern::conv
