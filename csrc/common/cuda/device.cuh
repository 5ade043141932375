// The words CUDA kernels of this package are written in. Two meanings: PTX under nvcc (ptx.cuh), and an emulation that
// watches every step under a plain C++ compiler (csrc/tests/simt/device.h), so that the very source that ships is what
// the tests run without a GPU. Host code that only fills in what kernels are given sees host.h.
//
// Rules of kernel code, which the harness enforces where the compiler cannot:
// - Memory is reached through Global<T> and Shared<T> only: load<V>, store, copy_async16, load_matrix_x4. Neither can
// be
//   dereferenced. V is up to 16 bytes (Vec<T, N>) and the address is aligned to it.
// - Shared memory is the one dynamic arena, shared_memory(); no __shared__ variables.
// - Blocks are one-dimensional and of whole warps. A barrier is reached by all threads of the block at the same line.
// - copy_async16(to, from, bytes) copies `bytes` of 16 and zeroes the rest; nothing is there before copy_wait<N>, which
//   waits for all but the thread's N youngest groups, and a barrier makes it visible to other threads. Every copy is
//   waited for.
// - Votes, shuffles, load_matrix and mma order no memory; sync_warp, sync and sync_named do.
#pragma once

#include <cstdint>

namespace effkern::device {

// A function that host code and kernels both call.
#if defined(__CUDACC__)
#define EFFKERN_BOTH __host__ __device__ __forceinline__
#else
#define EFFKERN_BOTH inline
#endif

// N elements moved as one.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

}  // namespace effkern::device

#if defined(__CUDACC__)
#include "ptx.cuh"
#elif defined(EFFKERN_SIMT)
#include "../../tests/simt/device.h"
#else
#include "host.h"
#endif
