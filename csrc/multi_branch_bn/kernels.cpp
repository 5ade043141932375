#include "kernels.h"

namespace effkern::multi_branch_bn {

const Kernels& kernels(Isa isa) {
  static const Kernels* const tables[kIsas] = {&scalar::table, &avx2::table, &avx512::table};
  return *tables[static_cast<int>(isa)];
}

}  // namespace effkern::multi_branch_bn
