#include "kernels.h"

namespace effkern::pq {

const Kernels& kernels(Isa isa) {
  static const Kernels* const tables[kIsas] = {&scalar::table, &avx2::table, &avx512::table};
  return *tables[static_cast<int>(isa)];
}

}  // namespace effkern::pq
