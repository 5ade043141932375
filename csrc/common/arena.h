// Scratch memory of one thread: grows, is reused by the next call, and is never zeroed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace effkern {

class Arena {
 public:
  static constexpr size_t kAlign = 64;

  ~Arena() { std::free(data_); }
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Makes room for `bytes` in all and forgets what was taken before.
  void reset(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + kAlign - 1) / kAlign * kAlign;
    data_ = static_cast<char*>(std::aligned_alloc(kAlign, size_));
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }

  // Rounds a size up to what take() consumes, for sizing reset().
  static size_t bytes(size_t count, size_t element) { return (count * element + kAlign - 1) / kAlign * kAlign; }

  template <class T>
  T* take(size_t count) {
    T* result = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes(count, sizeof(T));
    return result;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// The calling thread's arena. Not reentrant: whoever resets it owns it until it returns.
inline Arena& thread_arena() {
  static thread_local Arena arena;
  return arena;
}

}  // namespace effkern
