// The gradient in the weight (csrc/conv_backward/wgrad.cuh) on the CPU: every product type and tile.
#include "wgrad_case.h"

namespace effkern::test::simt {
namespace {

using namespace conv::gpu;

template <Math kMath, class T>
void every_tile() {
  wgrad_tails<WgradLarge<kMath, T>>();
  wgrad_tails<WgradSmall<kMath, T>>();
  wgrad_tails<WgradUnaligned<kMath, T>>();
  wgrad_lists<WgradLarge<kMath, T, true>>();
  wgrad_lists<WgradSmall<kMath, T, true>>();
  wgrad_lists<WgradUnaligned<kMath, T, true>>();
}

}  // namespace

TEST(wgrad_gpu_f16) { every_tile<Math::F16, F16>(); }
TEST(wgrad_gpu_bf16) { every_tile<Math::BF16, BF16>(); }
TEST(wgrad_gpu_tf32) { every_tile<Math::TF32, float>(); }
TEST(wgrad_gpu_f32) { every_tile<Math::F32, float>(); }

TEST(wgrad_gpu_main_loop_touches_banks_and_sectors_once) {
  const WgradCase c{.n = 2, .h = 8, .w = 8, .c_in = 64, .c_out = 128, .slice = 64};
  measure_wgrad<WgradLarge<Math::F16, F16>>(c);
  measure_wgrad<WgradSmall<Math::BF16, BF16>>(c);
  measure_wgrad<WgradLarge<Math::TF32, float>>(c);
  measure_wgrad<WgradSmall<Math::F32, float>>(c);
  WgradCase some = c;
  some.n = 4, some.listed = {{2, 0, 3}};
  measure_wgrad<WgradLarge<Math::F16, F16, true>>(some);
  some.listed.reset(), some.widths = {{64, 128}, {16, 48}, {48, 16}, {0, 32}};
  measure_wgrad<WgradSmall<Math::F16, F16, true>>(some);
  measure_wgrad<WgradLarge<Math::TF32, float, true>>(some);
}

}  // namespace effkern::test::simt
