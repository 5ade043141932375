// The inner loops for AVX2 + FMA.
#include "ukernel.h"

EFFKERN_TARGET_AVX2

namespace effkern::conv::avx2 {

#include "../common/lanes_impl.h"
#include "activation_impl.h"
#include "gemm_impl.h"
#include "ukernel_impl.h"
#include "winograd_impl.h"

const Kernels table = {
    6, tile<8, 6>, {6, 1, gemm<8, 6>}, store<8>, winograd<8, F23>(), winograd33<8>(), winograd43<8>()};
const Kernels table16 = {
    12, tile<16, 12>, {8, 2, gemm_pair<8>}, store<16>, winograd<16, F23>(), winograd33<16>(), winograd43<16>()};

}  // namespace effkern::conv::avx2

EFFKERN_TARGET_END
