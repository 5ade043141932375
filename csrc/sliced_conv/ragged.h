// Per-sample widths: checked, sorted into classes of equal (c_in, c_out).
#pragma once

#include <vector>

#include "../common/tensor.h"

namespace effkern::sliced_conv {

// int32 or int64 [samples] on the CPU, every value in [0, most]; else an error that names the sample.
std::vector<int64_t> read_widths(const Tensor& widths, int64_t samples, int64_t most, Arg arg);

// A [rows, >= columns] table of per-channel parameters as contiguous fp32 [rows][columns]: a view where it is that
// already, else a copy.
class FloatTable {
 public:
  FloatTable(const MaybeTensor& table, int64_t columns, ScalarType other, Arg arg, bool finite = false);
  const float* data() const { return data_; }  // null if the tensor was not given
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

 private:
  std::vector<float> own_;
  const float* data_ = nullptr;
  int64_t rows_ = 0, columns_ = 0;
};

// Samples of one width class: order[begin] .. order[end - 1], ascending.
struct WidthClass {
  int64_t c_in, c_out, begin, end;
};

struct Classes {
  std::vector<int64_t> order;
  std::vector<WidthClass> list;  // ascending c_out, then c_in: the panels of a narrow class are warm for the next one
};

Classes sort_classes(const std::vector<int64_t>& c_in, const std::vector<int64_t>& c_out);

// Writes zeros to the channels of y past c_out[n] of every sample.
void zero_tails(const conv::Activation& y, const std::vector<int64_t>& c_out);

}  // namespace effkern::sliced_conv
