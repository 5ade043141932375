// The inner loops of the weight gradient for AVX-512 (F, BW, VL, DQ).
#include "wgrad_ukernel.h"

EFFKERN_TARGET_AVX512

namespace effkern::conv::avx512 {
namespace {

#include "../common/lanes_impl.h"
#include "wgrad_ukernel_impl.h"

}  // namespace

const WgradKernels wgrad_table = {12, tile<16, 12>, depthwise<16>, column_sum<16>};

}  // namespace effkern::conv::avx512

EFFKERN_TARGET_END
