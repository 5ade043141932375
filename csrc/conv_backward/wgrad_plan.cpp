#include "wgrad_plan.h"

#include <algorithm>
#include <new>

#include "wgrad_ukernel.h"

namespace effkern::conv {
namespace {

// Pixels of a block: a panel of gy (16 KiB) and the x under a tile stay in L1 for all taps, and the sums, read and
// written once a block, cost 2 %. Sums that do not stay in L2 cost more: then twice the pixels.
constexpr int64_t kPixels = 256;
// The sums of all chunks together stay in L2, or there is one chunk.
constexpr int64_t kPartialFloats = 256 * 1024, kMaxChunks = 16;
constexpr int64_t kStagedFloats = 64 * 1024;  // half of a 512 KiB L2
// Below this many input channels tiles are too low to hide the latency of their sums or to outweigh the ends of lines.
constexpr int64_t kMergedChannels = 24;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels that lie a multiple of `pitch` floats apart share an eighth of a 32 KiB cache of 8 ways, or less, and one or
// two entries of the TLB each. gy is read once a tile of input channels and tap, and copied at half that line.
constexpr int64_t kAliasedX = 512, kAliasedGy = 128;
// Panels of gy that are copied at a time: a pixel's part of them are some cache lines side by side.
constexpr int64_t kGyPanels = 4;

int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t f : factors)
    if (__builtin_mul_overflow(result, f, &result) || result > (int64_t{1} << 58)) throw std::bad_alloc();
  return result;
}

}  // namespace

WgradPlan make_wgrad_plan(const WgradProblem& p, int64_t threads, int64_t tile_rows) {
  WgradPlan plan{};
  const int64_t in = p.c_in / p.groups, out = p.c_out / p.groups, count = std::max<int64_t>(p.count, 1);
  plan.depthwise = p.groups > 1 && in == 1 && out == 1;
  plan.taps = product({p.kh, p.kw});
  plan.units = plan.depthwise ? ceil_div(p.c_out, kMaxDepthwise) : p.groups * panels_of(out);
  plan.unit_floats =
      plan.depthwise ? product({plan.taps + 1, kMaxDepthwise}) : product({plan.taps, in, kPanel}) + kPanel;
  const int64_t sums = product({plan.units, plan.unit_floats});

  // Nothing to sum is one block without rows.
  const int64_t map = std::max<int64_t>(p.gy.h * p.gy.w, 1), height = std::max<int64_t>(p.gy.h, 1);
  const int64_t pixels = sums > kPartialFloats ? 2 * kPixels : kPixels;
  plan.samples = 1;
  plan.rows = p.gy.h;
  if (map <= pixels)
    plan.samples = ceil_div(count, ceil_div(count, std::clamp<int64_t>(pixels / map, 1, count)));  // even blocks
  else
    plan.rows = ceil_div(height, std::min(ceil_div(map, pixels), height));
  plan.bands = ceil_div(height, std::max<int64_t>(plan.rows, 1));
  plan.blocks = ceil_div(count, plan.samples) * plan.bands;
  plan.chunks = std::clamp<int64_t>(kPartialFloats / sums, 1, std::min(kMaxChunks, plan.blocks));
  plan.chunk_blocks = ceil_div(plan.blocks, plan.chunks);
  plan.chunks = ceil_div(plan.blocks, plan.chunk_blocks);
  plan.splits = plan.chunks % threads == 0 || plan.chunks >= 4 * threads ? 1 : std::min(threads, plan.units);

  const bool readable = p.x.dtype == DType::F32 && p.x.sc == 1;
  plan.stage_gy =
      p.gy.dtype != DType::F32 || p.gy.sc != 1 || (!plan.depthwise && (out % kPanel != 0 || p.gy.sw % kAliasedGy == 0));
  if (!plan.depthwise && in > 0 && in < kMergedChannels && p.kw > 1 && p.kw * in <= 16 * kMergedChannels &&
      p.dil[1] == 1)
    plan.source = Source::Merged;
  else if (!readable || p.x.sw * p.stride[1] % kAliasedX == 0)
    plan.source = Source::Tiles;
  plan.stage_x = plan.depthwise ? !readable : plan.source != Source::InPlace;
  plan.in_rows = std::clamp<int64_t>((plan.rows - 1) * p.stride[0] + (p.kh - 1) * p.dil[0] + 1, 0, p.x.h);
  plan.in_columns = plan.source == Source::Merged ? (std::max<int64_t>(p.gy.w, 1) - 1) * p.stride[1] + p.kw : p.x.w;
  plan.direct = !plan.depthwise && plan.blocks == 1;
  const int64_t in_pixels = product({plan.samples, plan.in_rows, plan.in_columns});
  plan.tile_rows = tile_rows;
  plan.block_tiles = std::max<int64_t>(ceil_div(in, tile_rows), 1);
  if (plan.source == Source::Tiles && in_pixels > 0)
    plan.block_tiles = std::clamp<int64_t>(kStagedFloats / (in_pixels * tile_rows), 1, plan.block_tiles);
  const int64_t columns = plan.depthwise                  ? kMaxDepthwise
                          : plan.source == Source::Merged ? in
                                                          : plan.block_tiles * tile_rows;
  plan.x_floats = plan.stage_x ? product({in_pixels, columns}) : 0;
  // All panels where x is copied in several parts, each of which meets all of gy.
  plan.gy_panels = std::min(plan.block_tiles * tile_rows < in ? panels_of(out) : kGyPanels, panels_of(out));
  plan.gy_floats =
      plan.stage_gy
          ? product({plan.samples, plan.rows, p.gy.w, plan.depthwise ? kMaxDepthwise : plan.gy_panels * kPanel})
          : 0;
  // A kernel row of a depthwise filter has a run for three taps, and one a tap for the columns at the borders.
  plan.max_runs = product({plan.taps, plan.depthwise ? 2 : 1});
  plan.max_lines = product({plan.taps, plan.depthwise ? 3 : 1, plan.samples, plan.rows}) + plan.samples * plan.rows;
  return plan;
}

}  // namespace effkern::conv
