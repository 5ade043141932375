// Launching kernels from host code: every launch is checked, and a failure is a Python RuntimeError that names the
// kernel.
#pragma once

#include <cuda_runtime.h>

#include "../check.h"
#include "device.cuh"

namespace effkern::device {

inline void check(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch that failed leaves its error behind for whoever asks next
  fail("RuntimeError", kernel, ": ", cudaGetErrorString(status));
}

constexpr int kSharedByDefault = 48 << 10;  // more needs to be asked for, kernel by kernel

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned grid, int threads, int shared,
            cudaStream_t stream, const Arguments&... arguments) {
  if (shared > kSharedByDefault)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared), stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

// The most blocks of this kernel that the current device holds at once: what a kernel that walks its work is launched
// with. Depends on the device alone; nothing is asked of the stream, so it may be called while a graph is captured.
template <class... Parameters>
unsigned resident_blocks(const char* name, void (*kernel)(Parameters...), int threads, int shared) {
  int device = 0, processors = 0, each = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name);
  if (shared > kSharedByDefault)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared)), name);
  if (each == 0)
    fail("RuntimeError", name, ": this device cannot hold a block of ", threads, " threads and ", shared, " bytes");
  return static_cast<unsigned>(each * processors);
}

}  // namespace effkern::device
