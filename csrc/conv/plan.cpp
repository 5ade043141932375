#include "plan.h"

#include <algorithm>
#include <limits>

#include "../common/arena.h"
#include "ukernel.h"

namespace effkern::conv {
namespace {

// Pixels per item. 96 keeps a panel of up to 64 input channels x 9 taps (36 KiB) hot in L1/L2 for 16 tiles; a decoded
// panel has to pay for its decoding (about 3.4 pixels' worth of arithmetic), so it is used for four times as many.
constexpr int64_t kPixels = 96, kDecodedPixels = 384;
constexpr int64_t kStageBytes = 256 * 1024;  // half of a 512 KiB L2
// Products of a part of a sum: its weights (16 KiB) stay in L1 beside the rows they meet.
constexpr int64_t kPart = 256;
constexpr int64_t kThin = 16;  // the taps of a kernel's row are joined where there are fewer input channels

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

namespace {

double macs(const Problem& p) {
  const double outputs = static_cast<double>(p.count) * p.y.h * p.y.w * p.c_out;
  return outputs * p.kh * p.kw * (p.groups > 0 ? p.c_in / p.groups : 0);
}

}  // namespace

// 20 us at the 50 GMAC/s of one AVX2 core; a pool of threads costs 5 to 10 us a call.
bool is_small(const Problem& p) { return macs(p) < 1e6; }

// 2 us; threads that wait for one another need a quarter of one.
bool is_tiny(const Problem& p) { return macs(p) < 1e5; }

const WinogradForm* winograd_form(const Problem& p) {
  static constexpr WinogradForm kForms[] = {{Algo::Winograd43, 1, 4, 6, {0, 4, 4, 5}, 130, 110},
                                            {Algo::Winograd23, 1, 2, 4, {0, 4}, 50, 50},
                                            {Algo::Winograd33, 2, 3, 7, {0, 3, 5}, 150, 80}};
  if (p.algo == Algo::Direct || p.depthwise != nullptr || p.kh != 3 || p.kw != 3 || p.dil[0] != 1 || p.dil[1] != 1 ||
      p.stride[0] != p.stride[1] || p.groups == 0 || p.c_in == 0)
    return nullptr;
  const int64_t in = p.c_in / p.groups, out = p.c_out / p.groups;
  if (p.algo == Algo::Auto && (in < 8 || out < 8)) return nullptr;
  const double panels = static_cast<double>(p.groups) * panels_of(out), pairs = panels * in;
  // A form that was asked for needs no comparison with indirect GEMM.
  double best = p.algo == Algo::Auto ? p.y.h * p.y.w * 9 * pairs / 0.93 : std::numeric_limits<double>::infinity();
  const WinogradForm* chosen = nullptr;
  for (const WinogradForm& form : kForms) {
    if (form.stride != p.stride[0] || (p.algo != Algo::Auto && p.algo != form.algo)) continue;
    const double tiles = static_cast<double>(ceil_div(p.y.h, form.tile)) * ceil_div(p.y.w, form.tile);
    const double values = static_cast<double>(line_values(form, p.y.h)) * line_values(form, p.y.w);
    const double cycles =
        values * pairs / 0.9 + tiles * (p.groups * panels_of(in) + panels) * form.input_output + pairs * form.weight;
    if (cycles >= best) continue;
    best = cycles;
    chosen = &form;
  }
  return chosen;
}

namespace {

// Output rows and whole maps of an item that hold about `target` units of tile x tile outputs.
void cut(const Problem& p, int64_t tile, int64_t target, int64_t threads, Plan& plan) {
  const int64_t lines = ceil_div(p.y.h, tile), line = ceil_div(p.y.w, tile);
  const int64_t map = std::max<int64_t>(lines * line, 1);
  plan.samples = 1;
  int64_t band = lines;
  if (map <= target)
    plan.samples = std::clamp<int64_t>(target / map, 1, std::max<int64_t>(p.count, 1));
  else
    band = std::min(lines, ceil_div(target, line));
  const auto in_rows = [&](int64_t b) {
    return std::min(p.x.h, (std::min(b * tile, p.y.h) - 1) * p.stride[0] + (p.kh - 1) * p.dil[0] + 1);
  };
  if (plan.staged) {
    const int64_t row_bytes = std::max<int64_t>(plan.stage_width * plan.stage_pitch * 4, 1);
    while (plan.samples > 1 && plan.samples * in_rows(band) * row_bytes > kStageBytes) plan.samples /= 2;
    while (band > 1 && plan.samples * in_rows(band) * row_bytes > kStageBytes) band = (band + 1) / 2;
    if (band < lines) plan.samples = 1;
  }
  // Even shares for the threads: a few large items must not leave one of them waiting.
  if (plan.samples > 1) {
    int64_t items = ceil_div(p.count, plan.samples);
    if (items % threads != 0 && items < 4 * threads) items = std::min(p.count, ceil_div(items, threads) * threads);
    plan.samples = ceil_div(p.count, items);
  }
  plan.bands = ceil_div(lines, band);
  if (plan.bands > 1 && plan.bands * p.count % threads != 0 && plan.bands * p.count < 4 * threads)
    plan.bands = std::min(lines, ceil_div(plan.bands, threads) * threads);
  band = ceil_div(lines, std::max<int64_t>(plan.bands, 1));  // even bands
  plan.bands = ceil_div(lines, std::max<int64_t>(band, 1));
  plan.rows = std::min(band * tile, p.y.h);
  plan.in_rows = in_rows(band);
  plan.items = ceil_div(p.count, plan.samples) * plan.bands;
  plan.pixels = plan.samples * plan.rows * p.y.w;
}

// Tiles an item should have: enough to pay for the transforms of the weights (3 tiles' worth of arithmetic), few enough
// that their input transforms stay in L2.
int64_t winograd_tiles(const Problem& p, const WinogradForm& form) {
  const int64_t bytes = form.side * form.side * p.c_in * static_cast<int64_t>(sizeof(float));
  return std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(bytes, 1), 48, 96) / 12 * 12;
}

}  // namespace

Plan make_plan(const Problem& p, int64_t threads) {
  Plan plan{};
  plan.form = winograd_form(p);
  // 12 rows of a power of two of 4 KiB lie in one set of the L1 cache, which has 8 ways: such inputs are copied apart.
  const bool aliased =
      p.x.sw * p.stride[1] % 1024 == 0 && p.c_in >= 64 && p.c_out / p.groups >= 64 && plan.form == nullptr;
  plan.joined = plan.form == nullptr && p.groups == 1 && p.c_in < kThin && p.kw > 1 && p.kw <= kThin &&
                p.pad[1] < p.kw && p.dil[1] == 1 && p.weight->tap_stride == p.c_in * kPanel;
  plan.staged = p.x.dtype != DType::F32 || p.x.sc != 1 || aliased || plan.joined;
  plan.stage_pitch = p.c_in % 512 == 0 ? p.c_in + 16 : p.c_in;
  plan.stage_left = plan.joined ? p.pad[1] : 0;
  plan.stage_width = plan.joined ? (p.y.w - 1) * p.stride[1] + p.kw : p.x.w;
  plan.taps = plan.joined ? p.kh : p.kh * p.kw;
  plan.depth = plan.joined ? p.kw * p.c_in : p.groups > 0 ? p.c_in / p.groups : 0;
  plan.part_depth = std::max<int64_t>(ceil_div(plan.depth, std::max<int64_t>(ceil_div(plan.depth, kPart), 1)), 1);
  plan.part_taps = std::max<int64_t>(kPart / std::max<int64_t>(plan.depth, 1), 1);
  const bool decoded = p.weight->scratch_floats() > 0;
  if (plan.form != nullptr)
    cut(p, plan.form->tile, winograd_tiles(p, *plan.form), threads, plan);
  else
    cut(p, 1, decoded || plan.joined ? kDecodedPixels : kPixels, threads, plan);
  plan.far = p.count * p.y.h * p.y.w * p.c_out * static_cast<int64_t>(dtype_size(p.y.dtype)) > kNearBytes;
  plan.panels = p.groups * panels_of(p.c_out / p.groups);
  plan.panel_splits = 1;
  // Fewer panels than threads: the maps are cut too, though each band transforms the weights.
  if (plan.form != nullptr && plan.items > 0 && plan.items * plan.panels < threads) {
    const int64_t lines = ceil_div(p.y.h, plan.form->tile), line = ceil_div(p.y.w, plan.form->tile);
    cut(p, plan.form->tile, ceil_div(lines, ceil_div(threads, plan.items * plan.panels)) * line, threads, plan);
  }
  const int64_t wanted = plan.form != nullptr ? threads : 2 * threads;
  if (threads > 1 && plan.items % threads != 0 && plan.items < 4 * wanted) {
    int64_t splits = ceil_div(wanted, plan.items);
    while (plan.items * splits % threads != 0) ++splits;  // even shares: at most `threads` times as many
    plan.panel_splits = std::clamp<int64_t>(splits, 1, std::max<int64_t>(plan.panels, 1));
  }
  return plan;
}

int64_t stage_floats(const Problem&, const Plan& plan) {
  return plan.staged ? plan.samples * plan.in_rows * plan.stage_width * plan.stage_pitch : 0;
}

int64_t zero_floats(const Problem& p, const Plan& plan) {
  // Joined taps move along a staged line.
  return std::max(p.c_in, plan.depth) + (plan.joined ? plan.stage_width * plan.stage_pitch : 0);
}

int64_t scratch_bytes(const Problem& p, const Plan& plan, int64_t tile_rows) {
  // A kernel far larger than the map (padding makes that legal) has more taps than memory could point to.
  int64_t pointers = 0;
  if (__builtin_mul_overflow(plan.taps, ceil_div(plan.pixels, tile_rows) * tile_rows, &pointers) ||
      pointers > (int64_t{1} << 58))
    throw std::bad_alloc();
  size_t bytes = Arena::bytes(zero_floats(p, plan), sizeof(float));
  bytes += Arena::bytes(pointers, sizeof(float*));               // indirection
  bytes += 3 * Arena::bytes(plan.pixels, sizeof(void*));         // lists of pixels
  bytes += Arena::bytes(plan.pixels * kMaxCols, sizeof(float));  // sums
  bytes += Arena::bytes(p.weight->scratch_floats(), sizeof(float));
  bytes += Arena::bytes(stage_floats(p, plan), sizeof(float));
  return static_cast<int64_t>(bytes);
}

}  // namespace effkern::conv
