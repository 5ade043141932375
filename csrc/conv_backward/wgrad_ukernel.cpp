#include "wgrad_ukernel.h"

namespace effkern::conv {

const WgradKernels& wgrad_kernels(Isa isa) {
  static const WgradKernels* const tables[kIsas] = {&scalar::wgrad_table, &avx2::wgrad_table, &avx512::wgrad_table};
  return *tables[static_cast<int>(isa)];
}

}  // namespace effkern::conv
