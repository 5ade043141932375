// What this module asks of torch from C++: a look at a tensor, and whether anything stands between a call and its
// kernel. Everything goes through CPython and DLPack, so one build serves every torch.
#pragma once

#include <pybind11/pybind11.h>

#include "../common/direct.h"
#include "dlpack.h"

namespace effkern::host {

class TorchApi {
 public:
  // Looks the names up; null, with no Python exception, if this torch lacks one of them. Held for good.
  static const TorchApi* connect();

  // True if a call would go to the CPU kernel and nowhere else: no mode of torch (functorch, fake tensors, tracing,
  // autocast, forward-mode differentiation, profiler, a torch function or dispatch mode) wants to see it.
  bool nothing_watches() const;
  bool records_gradients() const { return is_true(is_grad_enabled_); }

  // A CPU tensor of torch's own type, strided, with memory and elements, of a dtype that ops take. False, with no
  // exception, for anything else. With `grad`, also false if it requires a gradient.
  bool look(PyObject* object, bool grad, direct::TensorRef& out) const;

  const void* data(PyObject* object) const;  // of a CPU tensor of torch's own type, else null
  int64_t version(PyObject* tensor) const;   // -1 for a tensor that counts none
  void* storage(PyObject* tensor) const;     // address of its StorageImpl, null if it cannot be had

  // An uninitialised tensor; null with a Python exception.
  PyObject* empty(const int64_t size[4], const int64_t stride[4], int32_t type) const;

 private:
  static bool is_true(PyObject* function);
  static bool is_zero(PyObject* function);
  bool find();
  int64_t capacity(PyObject* tensor, const void* data) const;  // bytes from `data` to the end of the storage

  const DLPackExchangeAPI* dlpack_ = nullptr;
  PyObject *tensor_ = nullptr, *parameter_ = nullptr;
  PyObject *dispatch_modes_ = nullptr, *function_modes_ = nullptr, *functorch_ = nullptr, *is_tracing_ = nullptr,
           *is_profiling_ = nullptr, *is_autocast_ = nullptr, *is_grad_enabled_ = nullptr, *forward_ad_ = nullptr,
           *is_neg_ = nullptr, *requires_grad_ = nullptr, *version_ = nullptr, *untyped_storage_ = nullptr,
           *storage_data_ptr_ = nullptr, *empty_strided_ = nullptr, *level_ = nullptr, *cdata_ = nullptr,
           *cpu_ = nullptr;
  PyObject *float32_ = nullptr, *bfloat16_ = nullptr, *float16_ = nullptr;
};

}  // namespace effkern::host
