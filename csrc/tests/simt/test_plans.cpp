// Prints what each kernel is launched with, for the static checks (tests/gpu/proof_static.py).
#include "../../conv/conv_configs.cuh"
#include "../check.h"

namespace effkern::test {
namespace {

using namespace conv::gpu;

template <class C>
void print() {
  constexpr const char* names[] = {"F16", "BF16", "TF32", "F32"};
  std::printf("plan %s %dx%d %dx%d %d%s: %d threads %d bytes %d blocks\n", names[static_cast<int>(C::kMath)], C::kTileM,
              C::kTileN, C::kWarpM, C::kWarpN, C::kStages, C::kAligned ? "" : "u", C::kThreads, kSharedBytes<C>,
              C::kBlocks);
  EXPECT(kSharedBytes<C> <= 99 << 10, "more than a block may have on parts with 100 KiB");
}

template <Math kMath, class T>
void tiles() {
  print<Large<kMath, T>>();
  print<Narrow<kMath, T>>();
  print<Small<kMath, T>>();
  print<Unaligned<kMath, T>>();
}

}  // namespace

TEST(conv_gpu_plans) {
  tiles<Math::F16, device::F16>();
  tiles<Math::BF16, device::BF16>();
  tiles<Math::TF32, float>();
  tiles<Math::F32, float>();
}

}  // namespace effkern::test
