// The inner loops for any x86-64 (SSE2, no FMA) and other processors.
#include "ukernel.h"

namespace effkern::conv::scalar {

#include "ukernel_impl.h"

const Kernels table = {6, tile<4, 6>, depthwise<4, 6>, store<4>};

}  // namespace effkern::conv::scalar
