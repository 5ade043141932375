#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace effkern {
namespace {

std::atomic<int> chosen{-1};

Isa widest() {
  if (isa_available(Isa::Avx512)) return Isa::Avx512;
  return isa_available(Isa::Avx2) ? Isa::Avx2 : Isa::Scalar;
}

void require(Isa wanted, const char* who) {
  if (!isa_available(wanted))
    throw std::runtime_error(std::string("ValueError: ") + who + ": this processor has no " + isa_name(wanted) +
                             "; its widest instruction set is " + isa_name(widest()));
}

}  // namespace

bool isa_available(Isa wanted) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (wanted == Isa::Avx2) return avx2;
  if (wanted == Isa::Avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return wanted == Isa::Scalar;
}

const char* isa_name(Isa which) {
  static const char* const names[kIsas] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(which)];
}

Isa isa_from_name(const char* name) {
  for (int i = 0; i < kIsas; ++i)
    if (std::strcmp(name, isa_name(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
  throw std::runtime_error(std::string("ValueError: instruction set must be scalar, avx2 or avx512, got '") + name +
                           "'");
}

Isa isa() {
  int value = chosen.load(std::memory_order_relaxed);
  if (value < 0) {
    const char* wanted = std::getenv("EFFKERN_ISA");
    const Isa first = wanted != nullptr && *wanted != '\0' ? isa_from_name(wanted) : widest();
    require(first, "EFFKERN_ISA");
    value = static_cast<int>(first);
    chosen.store(value, std::memory_order_relaxed);
  }
  return static_cast<Isa>(value);
}

void set_isa(Isa wanted) {
  require(wanted, "set_isa");
  chosen.store(static_cast<int>(wanted), std::memory_order_relaxed);
}

}  // namespace effkern
