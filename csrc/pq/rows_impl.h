// What run_dots and run_lut share: where a row begins in memory, and its way out through the engine's epilogue.
#pragma once

#include <algorithm>

#include "../conv/ukernel.h"
#include "rows.h"

namespace effkern::pq {

// Row number -> elements of x and y.
class RowMap {
 public:
  explicit RowMap(const Rows& rows) : p_(rows.problem), begin_(rows.begin), length_(rows.end - rows.begin) {}

  int64_t x(int64_t row) const {
    const int64_t n = row / length_, pixel = begin_ + row % length_;
    return n * p_.x.sn + pixel / p_.y.w * p_.stride[0] * p_.x.sh + pixel % p_.y.w * p_.stride[1] * p_.x.sw;
  }
  int64_t y(int64_t row) const {
    const int64_t n = row / length_, pixel = begin_ + row % length_;
    return n * p_.y.sn + pixel / p_.y.w * p_.y.sh + pixel % p_.y.w * p_.y.sw;
  }

 private:
  const conv::Problem& p_;
  int64_t begin_, length_;
};

// Stores c[row][16], outputs [first, first + 16) of `count` rows that begin at elements y[row] of the output.
inline void store_rows(const conv::Problem& p, const int64_t* y, int64_t count, int64_t first, const float* c) {
  const conv::Kernels& k = conv::kernels(isa());
  conv::Store s;
  s.cols = std::min(conv::kPanel, p.c_out - first);
  s.y_dtype = p.y.dtype;
  s.y_sc = p.y.sc;
  s.act = p.epilogue.act;
  s.has_residual = false;
  s.one_table = true;
  s.scale[0] = p.epilogue.scale != nullptr ? p.epilogue.scale + first : nullptr;
  s.shift[0] = p.epilogue.shift != nullptr ? p.epilogue.shift + first : nullptr;
  for (int64_t done = 0; done < count; done += s.rows) {
    s.rows = std::min(conv::kMaxRows, count - done);
    for (int64_t r = 0; r < s.rows; ++r) {
      s.y[r] = static_cast<char*>(p.y.data) + (y[done + r] + first * p.y.sc) * dtype_size(p.y.dtype);
      s.residual[r] = nullptr;
    }
    k.store(s, c + done * conv::kPanel);
  }
}

}  // namespace effkern::pq
