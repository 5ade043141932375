// The 16-bit storage types: every value goes there and back, and rounding is to nearest even.
#include <cmath>

#include "../common/half.h"
#include "check.h"
#include "oracle.h"

namespace effkern::test {
namespace {

template <class Up, class Down>
void round_trip(Up up, Down down, const char* name) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = up(static_cast<uint16_t>(bits));
    const uint16_t back = down(value);
    if (std::isnan(value))
      EXPECT(std::isnan(up(back)), name, " ", bits);
    else
      EXPECT(back == bits, name, " ", bits, " came back as ", back);
  }
}

// The nearest of all 65536 values by search, ties to the even one.
template <class Up, class Down>
void rounds_to_nearest_even(Up up, Down down, float limit, const char* name) {
  for (int i = 0; i < 20000; ++i) {
    const float value = std::ldexp(normal(), static_cast<int>(draw(-30, 14)));
    if (std::fabs(value) > limit) continue;
    const uint16_t got = down(value);
    const double error = std::fabs(static_cast<double>(up(got)) - value);
    for (int step : {-1, 1}) {
      const uint16_t beside = static_cast<uint16_t>(got + step);
      const double other = std::fabs(static_cast<double>(up(beside)) - value);
      if (std::isnan(other)) continue;
      EXPECT(error < other || (error == other && (got & 1) == 0), name, " ", value);
    }
  }
}

}  // namespace

TEST(bf16_round_trip) { round_trip(bf16_to_float, float_to_bf16, "bf16"); }
TEST(f16_round_trip) { round_trip(f16_to_float, float_to_f16, "f16"); }
TEST(bf16_rounding) { rounds_to_nearest_even(bf16_to_float, float_to_bf16, 3e38f, "bf16"); }
TEST(f16_rounding) { rounds_to_nearest_even(f16_to_float, float_to_f16, 65504.0f, "f16"); }

TEST(f16_overflow_is_infinite) {
  EXPECT(float_to_f16(65519.0f) == 0x7bff);
  EXPECT(float_to_f16(65520.0f) == 0x7c00);
  EXPECT(float_to_f16(-1e30f) == 0xfc00);
  EXPECT(float_to_f16(1e-30f) == 0);
}

}  // namespace effkern::test
