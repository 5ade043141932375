// The depthwise inner loops for AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "depthwise_kernel.h"

EFFKERN_TARGET_AVX512

namespace effkern::conv::avx512 {

template <int kLanes>
struct MaskedMemory;

template <>
struct MaskedMemory<16> {
  typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void save(float* p, int n, Vec v) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
  static void fence() { _mm_sfence(); }
};

#include "../common/lanes_impl.h"
#include "activation_impl.h"
#include "depthwise_impl.h"
#include "depthwise_sweep_impl.h"

constexpr DepthwiseKernels kTable = with_sweeps<16>(depthwise_kernels_of<16>());
const DepthwiseKernels depthwise_table = kTable;

}  // namespace effkern::conv::avx512

EFFKERN_TARGET_END
