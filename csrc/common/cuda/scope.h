// What host code of CUDA ops says about the device, in the real build and in the tests' (csrc/tests/simt/host.h), where
// tensors of the CPU stand for those of a GPU and launches run in the harness. With EFFKERN_RUNTIME the tests take this
// file as it ships, on a CUDA runtime of their own (csrc/tests/runtime).
#pragma once

#include "device.cuh"
#include "stream.h"

#if defined(EFFKERN_SIMT) && !defined(EFFKERN_RUNTIME)
#include "../../tests/simt/host.h"
#else

#include <torch/csrc/stable/accelerator.h>

#include "../tensor.h"

// In torch's CUDA library since long before stable::accelerator::Stream had a native handle (torch 2.13). Weak: the
// library must load with a torch that has no CUDA; there no tensor is on the GPU and nobody calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace effkern::device {

inline bool is_here(const Tensor& tensor) { return tensor.is_cuda(); }

// Makes x's device the current one while it lives; the stream is torch's current one there.
class Scope {
 public:
  // TypeError unless x is on the GPU: an op comes here when any of its tensors is.
  Scope(const Tensor& x, Arg arg) : guard_(index_of(x, arg)), stream_(current(x.get_device_index())) {}
  Stream stream() const { return stream_; }
  // A tensor's elements as a kernel takes them.
  template <class T>
  Global<T> of(const Tensor& tensor) const {
    return {static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()))};
  }

 private:
  static int32_t index_of(const Tensor& x, Arg arg) {
    EFFKERN_CHECK_TYPE(is_here(x), arg.op, ": ", arg.name, " must be on the GPU like the other arguments");
    return x.get_device_index();
  }
  static Stream current(int32_t device) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<Stream>(stream);
  }
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

}  // namespace effkern::device

#define EFFKERN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, m)
#endif
