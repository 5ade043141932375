// The inner loops of coded weights for AVX-512 (F, BW, VL, DQ).
#include "kernels.h"

EFFKERN_TARGET_AVX512

namespace effkern::pq::avx512 {

#include "kernels_impl.h"

const Kernels table = {offsets, panel, dots<4, 4>, 4, reduce, table_rows, fill_table, lookup, turn};

}  // namespace effkern::pq::avx512

EFFKERN_TARGET_END
