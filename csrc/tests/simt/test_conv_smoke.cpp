// A small part of test_conv.cpp that takes seconds: run by `make test`, and what every mutant must fail.
#include "conv_suites.h"

namespace effkern::test::simt {

TEST(conv_gpu_smoke_f16) {
  using C = Small<Math::F16, F16>;
  tails<C>();
  lists<C>();
  ragged<C>();
  epilogues<C>();
  holds<C>({.n = 2,
            .h = 7,
            .w = 6,
            .c_in = 8,
            .c_out = 24,
            .kernel = 3,
            .stride = 2,
            .pad = 2,
            .dilation = 2,
            .groups = 2,
            .ci = 16,
            .co = 32,
            .extra_x = 8,
            .extra_y = 8,
            .scale = true,
            .bias = true},
           2);
  Case far{.n = 2, .h = 5, .w = 4, .c_in = 16, .c_out = 24, .residual = true, .far = int64_t{3} << 31};
  far.x_rows = far.y_rows = {1}, far.count = 1;
  holds<C>(far, 2);
  measure<C>({.n = 2, .h = 8, .w = 8, .c_in = 64, .c_out = 128, .residual = true});
  // One stage, all of it full, whose place is the epilogue's next.
  holds<C>({.h = 8, .w = 8, .c_in = 48, .c_out = 64, .kernel = 1, .pad = 0});
  // Zeros past the outputs though 0 * inf is NaN.
  holds<C>({.h = 3, .w = 3, .c_in = 16, .c_out = 11, .kernel = 1, .pad = 0, .zero_to = 24, .infinite = true}, 2);
}

TEST(conv_gpu_smoke_tf32) {
  using C = Small<Math::TF32, float>;
  tails<C>();
  holds<C>({.n = 2, .h = 6, .w = 5, .c_in = 36, .c_out = 24, .values = Values::Normal});
}

TEST(conv_gpu_smoke_f32) {
  tails<Unaligned<Math::F32, float>>();
  measure<Small<Math::F32, float>>({.n = 1, .h = 8, .w = 8, .c_in = 32, .c_out = 64});
}

}  // namespace effkern::test::simt
