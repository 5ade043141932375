// The bias of a layer and the tables of its widths, as the ragged ops on the CPU read them.
#pragma once

#include <algorithm>
#include <vector>

#include "ragged.h"
#include "slice.h"

namespace effkern::sliced_conv {

// Everything about the epilogue that the classes share: tables as fp32, the row of every sample, the bias.
class Tables {
 public:
  Tables(const char* op, const PackedWeight::Dims& dims, const float* packed_bias, const MaybeTensor& bias,
         const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& width_idx, int64_t samples,
         int64_t columns, ScalarType dtype)
      : columns_(columns),
        bias_(bias, dims.out_channels, dtype, {op, "bias"}),
        scale_(scale, columns, dtype, {op, "scale_table"}, /*finite=*/true),
        shift_(shift, columns, dtype, {op, "shift_table"}) {
    values_ = bias_ ? bias_.data() : packed_bias;
    const bool tables = scale_.data() != nullptr || shift_.data() != nullptr;
    EFFKERN_CHECK_VALUE(tables == width_idx.has_value(), op, ": width_idx must be given with, and only with, tables");
    if (!tables) return;
    EFFKERN_CHECK_VALUE(scale_.data() == nullptr || shift_.data() == nullptr || scale_.rows() == shift_.rows(), op,
                        ": scale_table and shift_table must have as many rows, got ", scale_.rows(), " and ",
                        shift_.rows());
    const int64_t rows = count();
    EFFKERN_CHECK_VALUE(rows > 0 || samples == 0, op, ": the tables must have at least one row");
    for (const int64_t row : read_widths(*width_idx, samples, rows - 1, {op, "width_idx"}))
      rows_.push_back(static_cast<int32_t>(row));
  }

  // The epilogue of one class. It points into this object and is good until the next call.
  conv::Epilogue epilogue(const PackedWeight::Dims& dims, const RunningPart& run, conv::Act act) {
    conv::Epilogue e;
    e.act = act;
    e.scale = scale_.data();
    e.shift = shift_.data();
    e.table_stride = columns_;
    e.table_row = this->rows();
    if (values_ == nullptr) return e;
    const int64_t rows = std::max<int64_t>(count(), 1);
    combined_.resize(static_cast<size_t>(rows * columns_) + 1);
    for (int64_t row = 0; row < rows; ++row) {
      const float* scale = e.scale != nullptr ? e.scale + row * columns_ : nullptr;
      const float* shift = e.shift != nullptr ? e.shift + row * columns_ : nullptr;
      add_bias(values_, scale, shift, dims, run, combined_.data() + row * columns_);
    }
    e.shift = combined_.data();
    return e;
  }

  const float* scale() const { return scale_.data(); }
  const float* shift() const { return shift_.data(); }
  int64_t count() const { return std::max(scale_.rows(), shift_.rows()); }
  // The row of every sample; null without tables.
  const int32_t* rows() const { return rows_.empty() ? nullptr : rows_.data(); }

 private:
  int64_t columns_;
  FloatVector bias_;
  FloatTable scale_, shift_;
  const float* values_ = nullptr;
  std::vector<int32_t> rows_;
  std::vector<float> combined_;
};

}  // namespace effkern::sliced_conv
