// Arrays in device memory whose elements tests permit one by one, and the count of kernel runs.
#pragma once

#include <cstring>
#include <memory>

#include "../../common/cuda/device.cuh"
#include "memory.h"

namespace effkern::test::simt {

using device::Global;

// A typed array in device memory; nothing permitted until `put` or `output`.
template <class T>
class Array {
 public:
  Array(const char* name, int64_t elements)
      : memory_(std::make_unique<Memory>(name, static_cast<size_t>(elements) * sizeof(T), 0, sizeof(T))) {}
  void put(int64_t i, T value) {
    std::memcpy(memory_->data() + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
    memory_->permit(static_cast<size_t>(i) * sizeof(T), sizeof(T), kReadable | kDefined);
  }
  void copy_values(const Array& from) { std::memcpy(memory_->data(), from.memory_->data(), memory_->size()); }
  void output(int64_t i) { memory_->permit(static_cast<size_t>(i) * sizeof(T), sizeof(T), kWritable); }
  T get(int64_t i) const {
    T value;
    std::memcpy(&value, memory_->data() + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  int stores(int64_t i) const { return memory_->stores(static_cast<size_t>(i) * sizeof(T)); }
  void poison() { memory_->poison(); }
  Global<T> global() const { return {reinterpret_cast<T*>(memory_->data()), memory_.get()}; }

 private:
  std::unique_ptr<Memory> memory_;
};

inline int64_t& schedules_run() {
  static int64_t runs = 0;
  return runs;
}

}  // namespace effkern::test::simt
