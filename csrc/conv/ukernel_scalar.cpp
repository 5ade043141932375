// The inner loops for any x86-64 (SSE2, no FMA) and other processors.
#include "ukernel.h"

namespace effkern::conv::scalar {

#include "../common/lanes_impl.h"
#include "activation_impl.h"
#include "ukernel_impl.h"
#include "winograd_impl.h"

const Kernels table = {6, tile<4, 6>, store<4>, WINOGRAD(4, F23), WINOGRAD(4, F33), WINOGRAD(4, F43)};

}  // namespace effkern::conv::scalar
