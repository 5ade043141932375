// The instruction sets this machine can run.
#pragma once

#include <vector>

#include "../common/cpu.h"

namespace effkern::test {

inline std::vector<Isa> available() {
  std::vector<Isa> all;
  for (int i = 0; i < kIsas; ++i)
    if (isa_available(static_cast<Isa>(i))) all.push_back(static_cast<Isa>(i));
  return all;
}

}  // namespace effkern::test
