// What some tensors were at a moment: which memory, seen how, holding what (effkern/ops/_memo.py has the reasons).
#pragma once

#include <cstdint>
#include <vector>

#include "torch_api.h"

namespace effkern::host {

class Stamp {
 public:
  // False if one of the tensors is not of the kind that packs are made of. None stands for a tensor not given.
  bool take(const TorchApi& torch, PyObject* const* tensors, Py_ssize_t count, bool full);

  // Whether these are the same tensors, unchanged.
  bool holds(const TorchApi& torch, PyObject* const* tensors, Py_ssize_t count) const;

 private:
  struct Source {
    bool given = false;
    const void* data = nullptr;
    const void* storage = nullptr;
    int64_t version = 0, span = 0, bits = 0;
    int32_t type = 0;
    std::vector<int64_t> sizes, strides;
  };
  bool full_ = false;
  std::vector<Source> sources_;
};

}  // namespace effkern::host
