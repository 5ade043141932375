// The GPU's convolution (csrc/conv/conv.cuh) on the CPU: every product type and tile, against sums in double. Integers
// make most comparisons exact, whatever the order of the sum; bytes that the kernel has no business with are forbidden,
// so foreign channels, unlisted samples and untouched outputs need no checks of their own.
#include "conv_suites.h"

namespace effkern::test::simt {
namespace {

template <Math kMath, class T>
void every_tile() {
  tails<Large<kMath, T>>();
  tails<Narrow<kMath, T>>();
  tails<Small<kMath, T>>();
  tails<Tiny<kMath, T>>();
  tails<Unaligned<kMath, T>>();
}

std::mt19937& dice() {
  static std::mt19937 engine(4);
  return engine;
}
int draw(int least, int most) { return least + static_cast<int>(dice()() % static_cast<uint32_t>(most - least + 1)); }

template <class C>
Case any_case() {
  constexpr int u = kUnit<C>;
  Case c;
  c.kernel = draw(1, 4), c.stride = draw(1, 3), c.pad = draw(0, 2), c.dilation = draw(1, 2), c.n = draw(1, 4);
  const int least = std::max(1, c.dilation * (c.kernel - 1) + 1 - 2 * c.pad);
  c.h = draw(least, least + 6), c.w = draw(least, least + 6);
  c.groups = draw(0, 3) == 0 ? draw(2, 3) : 1;
  if (C::kAligned) {
    c.ci = u * draw(1, 6), c.c_in = c.groups > 1 ? u * draw(1, c.ci / u) : draw(1, c.ci);
    c.extra_x = u * draw(0, 2);
  } else {
    c.ci = draw(1, 40), c.c_in = draw(1, c.ci), c.extra_x = draw(0, 3);
  }
  c.co = draw(1, 70), c.c_out = draw(1, c.co), c.extra_y = draw(0, 1) == 0 ? 0 : draw(0, 9);
  c.act = static_cast<Act>(draw(0, 4));
  c.scale = draw(0, 1) != 0, c.shift = draw(0, 1) != 0, c.residual = draw(0, 1) != 0,
  c.tables = draw(0, 2) == 0 ? 3 : 1;
  c.values = draw(0, 3) == 0 ? Values::Normal : Values::Integers;
  return c;
}

template <class C>
void random_cases(int cases) {
  for (int i = 0; i < cases; ++i) holds<C>(any_case<C>(), 2, static_cast<uint32_t>(8 + i));
}

template <Math kMath, class T>
void tiles_agree() {
  const Case c{.n = 2, .h = 6, .w = 7, .c_in = 72, .c_out = 40, .values = Values::Normal};
  const auto small = bits<Small<kMath, T>>(c);
  EXPECT(same(small, bits<Large<kMath, T>>(c)) && same(small, bits<Tiny<kMath, T>>(c)) &&
         same(small, bits<Narrow<kMath, T>>(c)) && same(small, bits<Unaligned<kMath, T>>(c)));
}

}  // namespace

TEST(conv_gpu_f16_with_tails) { every_tile<Math::F16, F16>(); }
TEST(conv_gpu_bf16_with_tails) { every_tile<Math::BF16, BF16>(); }
TEST(conv_gpu_tf32_with_tails) { every_tile<Math::TF32, float>(); }
TEST(conv_gpu_f32_with_tails) { every_tile<Math::F32, float>(); }

TEST(conv_gpu_any_shape) {
  random_cases<Small<Math::F16, F16>>(60);
  random_cases<Unaligned<Math::F16, F16>>(40);
  random_cases<Narrow<Math::BF16, BF16>>(30);
  random_cases<Large<Math::F16, F16>>(20);
  random_cases<Small<Math::TF32, float>>(40);
  random_cases<Unaligned<Math::TF32, float>>(20);
  random_cases<Small<Math::F32, float>>(40);
  random_cases<Unaligned<Math::F32, float>>(20);
}

TEST(conv_gpu_epilogues) {
  epilogues<Small<Math::F16, F16>>();
  epilogues<Small<Math::F32, float>>();
}

TEST(conv_gpu_follows_lists) {
  lists<Small<Math::F16, F16>>();
  lists<Large<Math::TF32, float>>();
  lists<Unaligned<Math::F32, float>>();
}

TEST(conv_gpu_takes_ragged_classes) {
  ragged<Small<Math::F16, F16>>();
  ragged<Narrow<Math::BF16, BF16>>();
  ragged<Small<Math::F32, float>>();
}

TEST(conv_gpu_offsets_pass_32_bits) {
  Case c{.n = 2, .h = 5, .w = 4, .c_in = 16, .c_out = 24, .residual = true, .far = int64_t{3} << 31};
  c.x_rows = c.y_rows = {1}, c.count = 1;
  holds<Small<Math::F16, F16>>(c, 2);
  holds<Unaligned<Math::F32, float>>(c, 2);
}

TEST(conv_gpu_is_the_same_in_every_tile_and_batch) {
  tiles_agree<Math::F16, F16>();
  tiles_agree<Math::BF16, BF16>();
  tiles_agree<Math::TF32, float>();
  tiles_agree<Math::F32, float>();
  using C = Small<Math::F16, F16>;
  Case all{.n = 5, .h = 5, .w = 5, .c_in = 24, .c_out = 40, .values = Values::Normal};
  const auto batch = bits<C>(all);
  Case one = all;
  for (int n = 0; n < all.n; ++n) {
    one.x_rows = one.y_rows = {n}, one.count = 1;
    Run<C> run(all, 7);  // the same numbers
    const auto alone = [&] {
      Run<C> listed(one, 7, &run);
      EXPECT(listed.run(11).ok());
      return listed.result();
    }();
    const size_t size = run.sample_size();
    EXPECT(std::memcmp(batch.data() + n * size, alone.data() + n * size, size * 2) == 0, "sample ", n);
  }
}

TEST(conv_gpu_main_loop_touches_banks_and_sectors_once) {
  const Case c{.n = 2, .h = 8, .w = 8, .c_in = 64, .c_out = 128, .residual = true};
  measure<Large<Math::F16, F16>>(c);
  measure<Large<Math::F16, F16>>({.n = 2, .h = 8, .w = 8, .c_in = 96, .c_out = 128});
  measure<Small<Math::BF16, BF16>>(c);
  measure<Tiny<Math::F16, F16>>(c);
  measure<Narrow<Math::TF32, float>>({.n = 2, .h = 8, .w = 8, .c_in = 32, .c_out = 32});
  measure<Small<Math::F32, float>>({.n = 1, .h = 8, .w = 8, .c_in = 32, .c_out = 64});
}

}  // namespace effkern::test::simt
