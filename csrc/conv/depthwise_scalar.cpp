// The depthwise inner loops for any x86-64 (SSE2, no FMA) and other processors.
#include "depthwise_kernel.h"

namespace effkern::conv::scalar {

template <int kLanes>
struct MaskedMemory;

template <>
struct MaskedMemory<4> {
  typedef float Vec __attribute__((vector_size(16), aligned(4), may_alias));
  static Vec load(const float* p, int n) {
    Vec v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static void save(float* p, int n, Vec v) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
};

#include "../common/lanes_impl.h"
#include "activation_impl.h"
#include "depthwise_impl.h"

constexpr DepthwiseKernels kTable = depthwise_kernels_of<4>();
const DepthwiseKernels depthwise_table = kTable;

}  // namespace effkern::conv::scalar
