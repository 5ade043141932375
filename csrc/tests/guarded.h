// Memory between two pages that no one may touch. The block ends exactly at the upper one, so a read of a single
// element too many is a segmentation fault, with or without a sanitizer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace effkern::test {

class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inside = (bytes + page - 1) / page * page;
    size_ = inside + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (inside != 0 && mprotect(base_ + page, inside, PROT_READ | PROT_WRITE) != 0)) {
      std::perror("guarded memory");
      std::abort();
    }
    data_ = base_ + page + inside - bytes;
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  void* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  char *base_, *data_;
  size_t size_;
};

}  // namespace effkern::test
