// A small part of test_wgrad.cpp that takes seconds, the depthwise form, and offsets past 2^31: run by `make test`, and
// what every mutant must fail.
#include "wgrad_case.h"

namespace effkern::test::simt {

using namespace conv::gpu;

TEST(wgrad_gpu_smoke) {
  wgrad_tails<WgradSmall<Math::F16, F16>>();
  wgrad_holds<WgradSmall<Math::F16, F16>>(
      {.n = 3, .h = 2, .w = 7, .c_in = 8, .c_out = 8, .kernel = {1, 3}, .pad = {-1, 1}, .far = int64_t{3} << 31}, 2);
  measure_wgrad<WgradSmall<Math::F16, F16>>({.n = 2, .h = 6, .w = 8, .c_in = 32, .c_out = 64});
}

TEST(wgrad_gpu_smoke_of_lists) {
  wgrad_lists<WgradSmall<Math::F16, F16, true>>(2);
  wgrad_lists<WgradUnaligned<Math::F32, float, true>>(1);
  WgradCase some{.n = 4, .h = 3, .w = 4, .c_in = 16, .c_out = 24, .slice = 64};
  some.listed = {{3, 0, 1}};
  wgrad_holds<WgradSmall<Math::F16, F16, true>>(some);
  some.listed.reset(), some.widths = {{8, 24}, {16, 3}, {0, 8}, {8, 24}};
  wgrad_holds<WgradSmall<Math::F16, F16, true>>(some);
  WgradCase c{.n = 4, .h = 6, .w = 8, .c_in = 32, .c_out = 128, .slice = 64};
  c.listed = {{2, 0, 3}};
  measure_wgrad<WgradSmall<Math::F16, F16, true>>(c);
  c.listed.reset(), c.widths = {{32, 128}, {16, 40}, {8, 8}, {0, 24}};
  measure_wgrad<WgradSmall<Math::TF32, float, true>>(c);
}

TEST(wgrad_gpu_smoke_32_bits) {
  wgrad_holds<WgradSmall<Math::TF32, float>>({.c_in = 20, .c_out = 36, .normal = true}, 3);
  measure_wgrad<WgradSmall<Math::TF32, float>>({.n = 1, .h = 6, .w = 8, .c_in = 32, .c_out = 64});
  wgrad_holds<WgradLarge<Math::F32, float>>({.n = 1, .c_in = 20, .c_out = 68, .kernel = {1, 1}, .pad = {0, 0}}, 2);
  wgrad_holds<WgradUnaligned<Math::F32, float>>({.n = 1, .c_in = 3, .c_out = 5, .chunks = false}, 3);
}

TEST(wgrad_gpu_depthwise) {
  const WgradCase one{.c_in = 1, .c_out = 1, .groups = 70};
  WgradCase c = one;
  depthwise_wgrad_holds<F16>(c);
  c.slice = 7, c.stride = {2, 1}, c.pad = {2, 0}, c.kernel = {5, 3}, c.h = 8;
  depthwise_wgrad_holds<BF16>(c);
  c.dilation = {1, 2}, c.chunks = false, c.groups = 33;
  depthwise_wgrad_holds<float>(c);
  c = one, c.groups = 5, c.normal = true;
  depthwise_wgrad_holds<float>(c, 2);
  c = one, c.n = 4, c.groups = 67, c.slice = 50, c.widths = {{67, 20}, {0, 67}, {67, 67}, {33, 67}};
  depthwise_wgrad_holds<BF16>(c, 3);
  c = one, c.groups = 8, c.h = 2, c.kernel = {1, 3}, c.pad = {-1, 1}, c.far = int64_t{3} << 31;
  depthwise_wgrad_holds<F16>(c, 2);
}

}  // namespace effkern::test::simt
