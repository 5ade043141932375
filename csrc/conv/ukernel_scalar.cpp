// The inner loops for any x86-64 (SSE2, no FMA) and other processors.
#include "ukernel.h"

namespace effkern::conv::scalar {

#include "../common/lanes_impl.h"
#include "activation_impl.h"
#include "gemm_impl.h"
#include "ukernel_impl.h"
#include "winograd_impl.h"

const Kernels table = {
    6, tile<4, 6>, {6, 1, gemm<4, 6>}, store<4>, winograd<4, F23>(), winograd33<4>(), winograd43<4>()};

}  // namespace effkern::conv::scalar
