// The depthwise inner loops for AVX2 + FMA.
#include <immintrin.h>

#include "depthwise_kernel.h"

EFFKERN_TARGET_AVX2

namespace effkern::conv::avx2 {

template <int kLanes>
struct MaskedMemory;

template <>
struct MaskedMemory<8> {
  typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec load(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static void save(float* p, int n, Vec v) { _mm256_maskstore_ps(p, mask(n), v); }
};

#include "../common/lanes_impl.h"
#include "activation_impl.h"
#include "depthwise_impl.h"

constexpr DepthwiseKernels kTable = depthwise_kernels_of<8>();
const DepthwiseKernels depthwise_table = kTable;

}  // namespace effkern::conv::avx2

EFFKERN_TARGET_END
