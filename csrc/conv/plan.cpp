#include "plan.h"

#include <algorithm>

#include "../common/arena.h"

namespace effkern::conv {
namespace {

// Pixels per item. 96 keeps a panel of up to 64 input channels x 9 taps (36 KiB) hot in L1/L2 for 16 tiles; a decoded
// panel has to pay for its decoding (about 3.4 pixels' worth of arithmetic), so it is used for four times as many.
constexpr int64_t kPixels = 96, kDecodedPixels = 384;
constexpr int64_t kStageBytes = 256 * 1024;  // half of a 512 KiB L2

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool is_small(const Problem& p) {
  // 20 us at the 50 GMAC/s of one AVX2 core; a pool of threads costs 5 to 10 us a call.
  constexpr double kMacs = 1e6;
  const double outputs = static_cast<double>(p.count) * p.y.h * p.y.w * p.c_out;
  return outputs * p.kh * p.kw * (p.groups > 0 ? p.c_in / p.groups : 0) < kMacs;
}

Plan make_plan(const Problem& p, int64_t threads) {
  Plan plan{};
  const bool decoded = p.weight != nullptr && p.weight->scratch_floats() > 0;
  const int64_t target = decoded ? kDecodedPixels : kPixels;
  const int64_t map = p.y.h * p.y.w, reach = (p.kh - 1) * p.dil[0] + 1;
  plan.staged = p.x.dtype != DType::F32 || p.x.sc != 1;
  plan.samples = 1;
  plan.rows = p.y.h;
  if (map <= target) {
    plan.samples = std::clamp<int64_t>(target / std::max<int64_t>(map, 1), 1, std::max<int64_t>(p.count, 1));
  } else {
    plan.rows = std::min(p.y.h, ceil_div(target, p.y.w));
  }
  const auto in_rows = [&](int64_t rows) { return std::min(p.x.h, (rows - 1) * p.stride[0] + reach); };
  if (plan.staged) {
    const int64_t row_bytes = std::max<int64_t>(p.x.w * p.c_in * 4, 1);
    while (plan.samples > 1 && plan.samples * in_rows(plan.rows) * row_bytes > kStageBytes) plan.samples /= 2;
    while (plan.rows > 1 && plan.samples * in_rows(plan.rows) * row_bytes > kStageBytes)
      plan.rows = (plan.rows + 1) / 2;
    if (plan.rows < p.y.h) plan.samples = 1;
  }
  plan.bands = ceil_div(p.y.h, plan.rows);
  plan.rows = ceil_div(p.y.h, plan.bands);  // even bands
  plan.in_rows = in_rows(plan.rows);
  plan.items = ceil_div(p.count, plan.samples) * plan.bands;
  plan.pixels = plan.samples * plan.rows * p.y.w;
  plan.panels = p.depthwise != nullptr ? panels_of(p.c_out) : p.groups * panels_of(p.c_out / p.groups);
  plan.panel_splits = std::clamp<int64_t>(ceil_div(2 * threads, plan.items), 1, std::max<int64_t>(plan.panels, 1));
  if (threads == 1) plan.panel_splits = 1;
  return plan;
}

int64_t scratch_bytes(const Problem& p, const Plan& plan, int64_t tile_rows) {
  // A kernel far larger than the map (padding makes that legal) has more taps than memory could point to.
  int64_t pointers = 0;
  if (__builtin_mul_overflow(p.kh * p.kw, ceil_div(plan.pixels, tile_rows) * tile_rows, &pointers) ||
      pointers > (int64_t{1} << 58))
    throw std::bad_alloc();
  size_t bytes = Arena::bytes(p.c_in, sizeof(float));       // the zero row
  bytes += Arena::bytes(pointers, sizeof(float*));          // indirection
  bytes += Arena::bytes(plan.pixels, 4 * sizeof(int64_t));  // pixel table
  if (p.weight != nullptr) bytes += Arena::bytes(p.weight->scratch_floats(), sizeof(float));
  if (plan.staged) bytes += Arena::bytes(plan.samples * plan.in_rows * p.x.w * p.c_in, sizeof(float));
  return static_cast<int64_t>(bytes);
}

}  // namespace effkern::conv
