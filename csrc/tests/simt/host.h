// The device as host code of CUDA ops sees it in tests: tensors of the CPU, their storages as memory of the harness.
#pragma once

#include <map>
#include <memory>

#include "../../common/tensor.h"
#include "memory.h"

namespace effkern::device {

inline bool is_here(const Tensor& tensor) { return tensor.is_cpu(); }

class Scope {
 public:
  Scope(const Tensor&, Arg) {}
  Stream stream() const { return nullptr; }
  template <class T>
  Global<T> of(const Tensor& tensor) const {
    int64_t bytes = 0, offset = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
    char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
    char* base = data - offset * static_cast<int64_t>(tensor.element_size());
    auto& memory = memories_[base];
    if (!memory || memory->size() != static_cast<size_t>(bytes))
      memory = std::make_unique<test::simt::Memory>("a tensor's storage", base, static_cast<size_t>(bytes), 1);
    return {reinterpret_cast<T*>(data), memory.get()};
  }

 private:
  mutable std::map<char*, std::unique_ptr<test::simt::Memory>> memories_;
};

}  // namespace effkern::device

#define EFFKERN_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(effkern_simt, CPU, m)
