// Instruction sets: what this processor has, what the user asked for, and the pragmas that compile for one.
#pragma once

namespace effkern {

enum class Isa : int { Scalar = 0, Avx2 = 1, Avx512 = 2 };

constexpr int kIsas = 3;

// True if the processor and the operating system both support the set. Avx512 means F, BW, VL and DQ together.
bool isa_available(Isa isa);

// The set kernels run with: EFFKERN_ISA (scalar|avx2|avx512) if given, else the widest available one.
// Throws std::runtime_error if EFFKERN_ISA names an unknown or unavailable set.
Isa isa();

// Overrides the choice for the whole process. Throws std::runtime_error if the processor lacks the set.
void set_isa(Isa isa);

const char* isa_name(Isa isa);

// "scalar", "avx2" or "avx512"; throws std::runtime_error on anything else.
Isa isa_from_name(const char* name);

}  // namespace effkern

// A file that holds code for one instruction set puts every #include first and then this line, once. A pragma rather
// than a compiler flag: with a flag, inline functions of the standard library would be compiled for that set too, and
// the linker might keep those copies for every processor. It stays on until the end of the file because templates are
// instantiated there.
#define EFFKERN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define EFFKERN_TARGET_AVX2 \
  EFFKERN_PRAGMA(clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function))
#define EFFKERN_TARGET_AVX512                                                                                      \
  EFFKERN_PRAGMA(clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                                      apply_to = function))
#define EFFKERN_TARGET_END EFFKERN_PRAGMA(clang attribute pop)
#else
#define EFFKERN_TARGET_AVX2 EFFKERN_PRAGMA(GCC target("avx2,fma,f16c"))
#define EFFKERN_TARGET_AVX512 EFFKERN_PRAGMA(GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))
#define EFFKERN_TARGET_END
#endif
