// The inner loops of coded weights for AVX2 + FMA.
#include "kernels.h"

EFFKERN_TARGET_AVX2

namespace effkern::pq::avx2 {

#include "kernels_impl.h"

const Kernels table = {offsets, panel, dots<3, 4>, 3, reduce, table_rows, fill_table, lookup, turn};

}  // namespace effkern::pq::avx2

EFFKERN_TARGET_END
