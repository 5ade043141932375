// The part of the device vocabulary that host code needs: pointers it hands to kernels and never follows.
#pragma once

#include <cstdint>
#include <type_traits>

namespace effkern::device {

template <class T>
struct Global {
  T* p = nullptr;

  Global() = default;
  Global(T* p) : p(p) {}
  template <class U>
    requires std::is_same_v<T, const U>
  Global(Global<U> other) : p(other.p) {}
  explicit operator bool() const { return p != nullptr; }
  Global operator+(int64_t i) const { return {p + i}; }
  template <class U>
  Global<U> as() const {
    return {reinterpret_cast<U*>(p)};
  }
};

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

}  // namespace effkern::device
