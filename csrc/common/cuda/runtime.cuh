// Launches by the CUDA runtime; see launch.cuh.
#pragma once

#include <cuda_runtime.h>

#include <tuple>

namespace effkern::device {

inline void check(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch that failed leaves its error behind for whoever asks next
  fail("RuntimeError", kernel, ": ", cudaGetErrorString(status));
}

constexpr int kSharedByDefault = 48 << 10;  // more needs to be asked for, kernel by kernel

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned grid, int threads, int shared, Stream stream,
            const Arguments&... arguments) {
  if (shared > kSharedByDefault)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  // Not <<<>>> and cudaGetLastError(): that would find the error of whoever failed before, and does not compile without
  // nvcc (csrc/tests/runtime).
  std::tuple<Parameters...> values(arguments...);
  check(std::apply(
            [&](auto&... value) {
              void* addresses[] = {const_cast<void*>(static_cast<const void*>(&value))...};
              return cudaLaunchKernel(kernel, dim3(grid), dim3(static_cast<unsigned>(threads)), addresses,
                                      static_cast<size_t>(shared), stream);
            },
            values),
        name);
}

inline unsigned processors(const char* name) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), name);
  return static_cast<unsigned>(count);
}

// The most shared memory that a block may ask for on the current device.
inline int most_shared(const char* name) {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  return bytes;
}

// The most blocks of this kernel that the current device holds at once: what a kernel that walks its work is launched
// with. Depends on the device alone; nothing is asked of the stream, so it may be called while a graph is captured.
template <class... Parameters>
unsigned resident_blocks(const char* name, void (*kernel)(Parameters...), int threads, int shared) {
  int each = 0;
  if (shared > kSharedByDefault)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared)), name);
  if (each == 0)
    fail("RuntimeError", name, ": this device cannot hold a block of ", threads, " threads and ", shared, " bytes");
  return static_cast<unsigned>(each) * processors(name);
}

}  // namespace effkern::device
