// What csrc/common/cuda/runtime.cuh calls of the CUDA runtime, for a device that is not there (runtime.h). Under the
// name of the real header, and with nothing that waits for a device: host code that calls such a thing does not
// compile. Numbers and forms are those of CUDA's own header.
#pragma once

#include <cstddef>
#include <functional>
#include <tuple>
#include <utility>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace effkern::test::runtime {

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
  std::function<void()> body;  // what a thread does
};
cudaError_t launch(const Launch& launch);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared);

}  // namespace effkern::test::runtime

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  using Values = std::tuple<std::remove_cv_t<Parameters>...>;
  const auto values = [&]<size_t... i>(std::index_sequence<i...>) {
    return Values(*static_cast<std::tuple_element_t<i, Values>*>(arguments[i])...);
  }(std::index_sequence_for<Parameters...>());
  return effkern::test::runtime::launch({reinterpret_cast<const void*>(kernel), grid, block, shared, stream,
                                         [kernel, values] { std::apply(kernel, values); }});
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return effkern::test::runtime::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...), int threads,
                                                          size_t shared) {
  return effkern::test::runtime::occupancy(blocks, reinterpret_cast<const void*>(kernel), threads, shared);
}
