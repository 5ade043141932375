// The inner loops for any x86-64 (SSE2, no FMA) and other processors.
#include "kernels.h"

namespace effkern::multi_branch_bn::scalar {

constexpr int kF16Lanes = 1;
struct F16 {
  static void widen(const uint16_t* from, float* to) { *to = f16_to_float(*from); }
  static void narrow(const float* from, uint16_t* to) { *to = float_to_f16(*from); }
};

constexpr int kStreamLanes = 1;
struct Streaming {
  static void save(float* to, const float* from) { *to = *from; }
  static void done() {}
};

#include "../common/lanes_impl.h"
#include "kernels_impl.h"

constinit const Kernels table = make_table<4>();

}  // namespace effkern::multi_branch_bn::scalar
