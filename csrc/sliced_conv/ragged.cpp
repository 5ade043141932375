#include "ragged.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "../common/parallel.h"

namespace effkern::sliced_conv {
namespace {

int64_t load_int(const Tensor& tensor, int64_t i) {
  const int64_t at = i * tensor.stride(0);
  if (tensor.scalar_type() == ScalarType::Int) return static_cast<const int32_t*>(tensor.const_data_ptr())[at];
  return static_cast<const int64_t*>(tensor.const_data_ptr())[at];
}

}  // namespace

std::vector<int64_t> read_widths(const Tensor& widths, int64_t samples, int64_t most, Arg arg) {
  check_cpu(widths, arg);
  EFFKERN_CHECK_TYPE(widths.scalar_type() == ScalarType::Int || widths.scalar_type() == ScalarType::Long, arg.op, ": ",
                     arg.name, " must be int32 or int64");
  EFFKERN_CHECK_VALUE(widths.dim() == 1 && widths.size(0) == samples, arg.op, ": ", arg.name, " must have shape [",
                      samples, "], got ", shape_text(widths));
  std::vector<int64_t> values(static_cast<size_t>(samples));
  for (int64_t n = 0; n < samples; ++n) {
    values[n] = load_int(widths, n);
    EFFKERN_CHECK_VALUE(values[n] >= 0 && values[n] <= most, arg.op, ": ", arg.name, "[", n, "] must be in [0, ", most,
                        "], got ", values[n]);
  }
  return values;
}

FloatTable::FloatTable(const MaybeTensor& table, int64_t columns, ScalarType other, Arg arg, bool finite) {
  if (!table.has_value()) return;
  check_cpu(*table, arg);
  EFFKERN_CHECK_VALUE(table->dim() == 2 && table->size(1) >= columns, arg.op, ": ", arg.name,
                      " must be 2-d [W, C] with C at least c_out_max = ", columns, ", got shape ", shape_text(*table));
  const DType dtype = float_dtype(*table, arg);
  EFFKERN_CHECK_TYPE(dtype == DType::F32 || table->scalar_type() == other, arg.op, ": ", arg.name,
                     " must be float32 or have x's dtype");
  rows_ = table->size(0);
  columns_ = columns;
  EFFKERN_CHECK_VALUE(rows_ <= std::numeric_limits<int32_t>::max(), arg.op, ": ", arg.name,
                      " must have fewer than 2^31 rows, got ", rows_);
  const int64_t row = table->stride(0), column = table->stride(1);
  static const float nothing = 0;
  const bool empty = rows_ * columns == 0;
  if (empty) {
    data_ = &nothing;
  } else if (dtype == DType::F32 && (columns == 1 || column == 1) && (rows_ == 1 || row == columns)) {
    data_ = static_cast<const float*>(table->const_data_ptr());
  } else {
    own_.resize(static_cast<size_t>(rows_ * columns));
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < columns; ++c)
        own_[r * columns + c] = load_float(table->const_data_ptr(), dtype, r * row + c * column);
    data_ = own_.data();
  }
  if (!finite || empty) return;
  for (int64_t i = 0; i < rows_ * columns; ++i)
    EFFKERN_CHECK_VALUE(std::isfinite(data_[i]), arg.op, ": ", arg.name, " must be finite, got ", data_[i], " at [",
                        i / columns, ", ", i % columns, "]");
}

Classes sort_classes(const std::vector<int64_t>& c_in, const std::vector<int64_t>& c_out) {
  const int64_t samples = static_cast<int64_t>(c_in.size());
  const auto key = [&](int64_t n) { return std::make_pair(c_out[n], c_in[n]); };
  Classes classes;
  classes.order.resize(c_in.size());
  std::iota(classes.order.begin(), classes.order.end(), int64_t{0});
  std::stable_sort(classes.order.begin(), classes.order.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t n = classes.order[i];
    if (i == 0 || key(classes.order[i - 1]) != key(n)) classes.list.push_back({c_in[n], c_out[n], i, i});
    classes.list.back().end = i + 1;
  }
  return classes;
}

void zero_tails(const conv::Activation& y, const std::vector<int64_t>& c_out) {
  const int64_t size = dtype_size(y.dtype), map = y.h * y.w;
  parallel_for(0, y.n, 1 + 65536 / (y.c * map + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t tail = y.c - c_out[n];
      char* sample = static_cast<char*>(y.data) + (n * y.sn + c_out[n] * y.sc) * size;
      if (tail == 0) continue;
      if (y.sc != 1 || map == 1) {  // whole planes, one after the other
        std::memset(sample, 0, static_cast<size_t>(tail * map * size));
      } else {
        for (int64_t pixel = 0; pixel < map; ++pixel)
          std::memset(sample + pixel * y.sw * size, 0, static_cast<size_t>(tail * size));
      }
    }
  });
}

}  // namespace effkern::sliced_conv
