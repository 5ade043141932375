#include "stamp.h"

#include <algorithm>

#include "fingerprint.h"

namespace effkern::host {
namespace {

// Elements from the first to the last one in memory.
int64_t span_of(const direct::TensorRef& t) {
  int64_t span = 1;
  for (int64_t i = 0; i < t.dim; ++i) span += (t.sizes[i] - 1) * t.strides[i];
  return span;
}

int64_t element_size(int32_t type) { return type == 6 ? 4 : type == 0 || type == 11 ? 1 : 2; }

}  // namespace

bool Stamp::take(const TorchApi& torch, PyObject* const* tensors, Py_ssize_t count, bool full) {
  full_ = full;
  sources_.resize(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    direct::TensorRef t;
    if (!torch.look(tensors[i], false, t)) return false;
    Source& s = sources_[i];
    s.given = true;
    s.data = t.data;
    s.storage = torch.storage(tensors[i]);
    s.version = torch.version(tensors[i]);
    s.type = t.type;
    s.sizes.assign(t.sizes, t.sizes + t.dim);
    s.strides.assign(t.strides, t.strides + t.dim);
    s.span = span_of(t);
    s.bits = fingerprint_bits(t.data, s.span, element_size(t.type), full);
    if (s.storage == nullptr || s.version < 0) return false;
  }
  return true;
}

bool Stamp::holds(const TorchApi& torch, PyObject* const* tensors, Py_ssize_t count) const {
  if (count != static_cast<Py_ssize_t>(sources_.size())) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Source& s = sources_[i];
    if (tensors[i] == Py_None || !s.given) {
      if (tensors[i] == Py_None && !s.given) continue;
      return false;
    }
    direct::TensorRef t;
    if (!torch.look(tensors[i], false, t)) return false;
    const auto dims = static_cast<size_t>(t.dim);
    if (t.data != s.data || t.type != s.type || dims != s.sizes.size() ||
        !std::equal(s.sizes.begin(), s.sizes.end(), t.sizes) ||
        !std::equal(s.strides.begin(), s.strides.end(), t.strides) || torch.version(tensors[i]) != s.version ||
        torch.storage(tensors[i]) != s.storage ||
        fingerprint_bits(t.data, s.span, element_size(t.type), full_) != s.bits)
      return false;
  }
  return true;
}

}  // namespace effkern::host
