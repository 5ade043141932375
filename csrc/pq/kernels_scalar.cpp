// The inner loops of coded weights for any x86-64 (SSE2, no FMA) and other processors.
#include "kernels.h"

namespace effkern::pq::scalar {

#include "kernels_impl.h"

const Kernels table = {offsets, panel, dots<2, 2>, 2, reduce, table_rows, fill_table, lookup, turn};

}  // namespace effkern::pq::scalar
