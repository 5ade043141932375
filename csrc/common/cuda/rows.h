// Tensors as kernels over rows of channels take them.
#pragma once

#include "arguments.h"
#include "columns.h"

namespace effkern::device {

// Kernels step past the last row by less than this from 2^31.
constexpr int64_t kMostRows = INT32_MAX - 64;

// A 4-d float tensor with channels side by side and all pixels one pitch apart, copied only where it is not so.
Tensor as_rows(const Tensor& map, const Tensor& x, Arg arg);

// Elements from pixel to pixel of such a tensor.
int64_t pitch_of(const Tensor& rows);

template <class T>
Rows<T> rows(const Scope& scope, const Tensor& t) {
  return {scope.of<T>(t), pitch_of(t)};
}

// Whether every chunk may be accessed whole; no rows at all may.
template <class T>
bool wide(const Rows<T>& rows) {
  return !rows.at || (reinterpret_cast<uintptr_t>(rows.at.p) % 16 == 0 && rows.pitch % kPerChunk<T> == 0);
}

}  // namespace effkern::device
