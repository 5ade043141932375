// The inner loops of the weight gradient for any x86-64 (SSE2, no FMA) and other processors.
#include "wgrad_ukernel.h"

namespace effkern::conv::scalar {
namespace {

#include "../common/lanes_impl.h"
#include "wgrad_ukernel_impl.h"

}  // namespace

const WgradKernels wgrad_table = {6, tile<4, 6>, depthwise<4>, column_sum<4>};

}  // namespace effkern::conv::scalar
