// The inner loops of the weight gradient for AVX2 + FMA.
#include "wgrad_ukernel.h"

EFFKERN_TARGET_AVX2

namespace effkern::conv::avx2 {
namespace {

#include "../common/lanes_impl.h"
#include "wgrad_ukernel_impl.h"

}  // namespace

const WgradKernels wgrad_table = {6, tile<8, 6>, depthwise<8>, column_sum<8>};
const WgradKernels wgrad_table16 = {12, tile<16, 12>, depthwise<16>, column_sum<16>};

}  // namespace effkern::conv::avx2

EFFKERN_TARGET_END
