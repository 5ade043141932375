// The inner loops for AVX-512 (F, BW, VL, DQ).
#include <immintrin.h>

#include "kernels.h"

EFFKERN_TARGET_AVX512

namespace effkern::multi_branch_bn::avx512 {

constexpr int kF16Lanes = 8;  // a vector of AVX2 is as fast here as one of AVX-512: memory is what this waits for
struct F16 {
  static void widen(const uint16_t* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void narrow(const float* from, uint16_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
  }
};

constexpr int kStreamLanes = 16;
struct Streaming {
  static void save(float* to, const float* from) { _mm512_stream_ps(to, _mm512_loadu_ps(from)); }
  static void done() { _mm_sfence(); }
};

#include "../common/lanes_impl.h"
#include "kernels_impl.h"

constinit const Kernels table = make_table<16>();

}  // namespace effkern::multi_branch_bn::avx512

EFFKERN_TARGET_END
