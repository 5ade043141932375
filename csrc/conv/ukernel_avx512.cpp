// The inner loops for AVX-512 (F, BW, VL, DQ).
#include "ukernel.h"

EFFKERN_TARGET_AVX512

namespace effkern::conv::avx512 {

#include "../common/lanes_impl.h"
#include "activation_impl.h"
#include "gemm_impl.h"
#include "ukernel_impl.h"
#include "winograd_impl.h"

const Kernels table = {
    12, tile<16, 12>, {8, 2, gemm_pair<8>}, store<16>, winograd<16, F23>(), winograd33<16>(), winograd43<16>()};

}  // namespace effkern::conv::avx512

EFFKERN_TARGET_END
