// The instruction-set switch in C, so that _host.so, another library, finds it in _C.so by name (csrc/host/isa.cpp).
#include <exception>

#include "cpu.h"

#define EFFKERN_EXPORT extern "C" __attribute__((visibility("default")))

// Number of the set in use (0 scalar, 1 avx2, 2 avx512), or -1 if EFFKERN_ISA asks for what there is not.
EFFKERN_EXPORT int effkern_isa() {
  try {
    return static_cast<int>(effkern::isa());
  } catch (const std::exception&) {
    return -1;
  }
}

EFFKERN_EXPORT int effkern_isa_available(int set) {
  return set >= 0 && set < effkern::kIsas && effkern::isa_available(static_cast<effkern::Isa>(set)) ? 1 : 0;
}

// 0 if done, -1 if the processor lacks the set; nothing has changed then.
EFFKERN_EXPORT int effkern_set_isa(int set) {
  if (effkern_isa_available(set) == 0) return -1;
  effkern::set_isa(static_cast<effkern::Isa>(set));
  return 0;
}
