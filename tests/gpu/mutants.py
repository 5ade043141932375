"""Faults seeded into the kernels, one at a time. A test suite that lets one pass does not prove the kernel.

A mutant is a change of the source's text, so the kernels carry no hooks for it; the text must occur exactly once, so a
mutant that no longer fits fails loudly.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str  # below csrc
    old: str
    new: str


CONV, LOADER, MATH, EPILOGUE = (f"conv/{name}.cuh" for name in ("conv", "conv_loader", "conv_math", "conv_epilogue"))
COMPACT, SCHEDULE = "block_skip/compact.cuh", "sliced_conv/schedule.cuh"
INDICES, DEPTHWISE = "common/cuda/indices.cuh", "conv/depthwise.cuh"
STAGE, STAGE_MATH = "block_skip/stage.cuh", "block_skip/stage_math.cuh"
LOOKUP, CODES, DECODE, DOTS, DOTS_MMA = (
    f"pq/{name}.cuh" for name in ("embedding", "codes", "decode", "dots", "dots_mma")
)
WGRAD, WGRAD_LOADER, WGRAD_MATH, DEPTHWISE_WGRAD, ACT_GRAD, TRANSPOSE, FOLD = (
    f"conv_backward/{name}.cuh"
    for name in ("wgrad", "wgrad_loader", "wgrad_math", "depthwise_wgrad", "act_grad", "transpose", "fold")
)
BLOCK_GRAD, RAGGED_GRAD, SLOPE = "block_skip/block_grad.cuh", "sliced_conv/ragged_grad.cuh", "conv_backward/slope.cuh"
BOOK_GRAD = "pq/book_grad.cuh"
BACKWARD = "conv_backward/backward_gpu.h"
COLUMNS, PIECES = "common/cuda/columns.cuh", "common/cuda/pieces.cuh"
BN_FORWARD, BN_BACKWARD = "multi_branch_bn/bn_forward.cuh", "multi_branch_bn/bn_backward.cuh"
BN_FINISH = "multi_branch_bn/bn_finish.cuh"

MUTANTS = (
    # Barriers and waits
    Mutant(
        "no barrier before a stage is multiplied",
        CONV,
        "device::sync();  // the stage is there",
        ";  // the stage is there",
    ),
    Mutant("no wait for the stage's copies", CONV, "device::copy_wait<C::kStages - 2>();", ";"),
    Mutant(
        "wait leaves one group too many",
        CONV,
        "device::copy_wait<C::kStages - 2>();",
        "device::copy_wait<C::kStages - 1>();",
    ),
    Mutant(
        "next stage filled before the barrier",
        CONV,
        "device::sync();  // the stage is there for all, and all are done with the one before it, "
        "which is filled next\n      sums.multiply(device::shared_memory() + full);\n"
        "      // Between the products, which run on while addresses are worked out, and not in front of them.\n"
        "      if (ahead > 0) loader.load();",
        "if (ahead > 0) loader.load();\n      device::sync();\n      sums.multiply(device::shared_memory() + full);",
    ),
    Mutant(
        "copies of a turn not committed",
        CONV,
        "      if (ahead > 0) loader.load();\n      device::copy_commit();",
        "      if (ahead > 0) loader.load();",
    ),
    Mutant(
        "no barrier between main loop and epilogue",
        CONV,
        "device::sync();  // the stages become the epilogue's",
        ";  // the stages become the epilogue's",
    ),
    Mutant(
        "no barrier after the table of rows",
        CONV,
        "  Epilogue<C>::place_rows(p, tile);\n  device::sync();",
        "  Epilogue<C>::place_rows(p, tile);",
    ),
    Mutant(
        "no barrier between tiles", CONV, "device::sync();  // the epilogue's memory", ";  // the epilogue's memory"
    ),
    Mutant("one step of K too few", CONV, "ahead > 1 - C::kStages", "ahead > 2 - C::kStages"),
    Mutant(
        "stages one short",
        CONV,
        "full + C::kStageBytes < C::kStages * C::kStageBytes",
        "full + 2 * C::kStageBytes < C::kStages * C::kStageBytes",
    ),
    Mutant(
        "no sync_warp before a strip is read",
        EPILOGUE,
        "      device::sync_warp();\n#pragma unroll",
        "#pragma unroll",
    ),
    Mutant(
        "no sync_warp before a strip is overwritten",
        EPILOGUE,
        "i * kRows + row_);\n      device::sync_warp();",
        "i * kRows + row_);",
    ),
    # Masks and tails
    Mutant(
        "tap validity off by one at the far side",
        LOADER,
        "return at >= 0 && at < size;",
        "return at >= 0 && at <= size;",
    ),
    Mutant(
        "tap validity off by one at the near side",
        LOADER,
        "return at >= 0 && at < size;",
        "return at > 0 && at < size;",
    ),
    Mutant("rows past the end not masked", LOADER, "      if (m >= tile.rows) continue;\n", ""),
    Mutant(
        "partial chunks copied whole",
        LOADER,
        "c_in_ % kPerChunk != 0 ? c_in_ - C::kDepth : INT32_MAX",
        "false ? 0 : INT32_MAX",
    ),
    Mutant("chunks past the channels not zeroed", LOADER, "mine > 0 ? live_ : 0;", "live_;"),
    Mutant("weights past the channels not zeroed", LOADER, "mine > 0 ? rows_b_ : 0;", "rows_b_;"),
    Mutant("second half of a stage not multiplied", CONV, "c + C::kHalfDepth < tile.part.c_in", "false"),
    Mutant("second half multiplied where nothing is", CONV, "c + C::kHalfDepth < tile.part.c_in", "true"),
    Mutant(
        "a channel too many in a partial chunk",
        LOADER,
        "(mine < 0 ? 0 : mine < kPerChunk ? mine : kPerChunk) * static_cast<int>(kSize);",
        "(mine < 0 ? 0 : mine < kPerChunk ? mine + 1 : kPerChunk) * static_cast<int>(kSize);",
    ),
    Mutant(
        "padding taps not zeroed",
        LOADER,
        "device::copy_async16_if((live & 1u << i) != 0, a",
        "device::copy_async16_if(live != 0, a",
    ),
    Mutant("unaligned gather ignores the channel count", LOADER, "if (e < count) chunk", "if (count > 0) chunk"),
    Mutant(
        "weights past the prefix read",
        LOADER,
        "rows_b_ = left > 0 ? ceil_div(left, kStep) : 0;",
        "rows_b_ = kB;",
    ),
    Mutant("inactive outputs stored", EPILOGUE, "if (e < active_ || e < zeros_) device::store", "device::store"),
    Mutant("vector store over the tail", EPILOGUE, "(active_ > zeros_ ? active_ : zeros_) >= kPer", "true"),
    Mutant(
        "tail zeros not written", CONV, "tile.part.c_out > p.zero_to ? tile.part.c_out : p.zero_to", "tile.part.c_out"
    ),
    Mutant(
        "tail holds sums, not zeros",
        EPILOGUE,
        "e < active_ ? activate(v.v[e], p_.act) : 0.0f",
        "activate(v.v[e], p_.act)",
    ),
    Mutant(
        "residual of inactive channels read", EPILOGUE, "if (e < active_) row.residual.v[e] = ", "row.residual.v[e] = "
    ),
    Mutant("rows past the end stored", EPILOGUE, "if (place.y < 0) return;", ""),
    # Addresses and indices
    Mutant(
        "fragment halves exchanged",
        MATH,
        "b[j][0] = both[0], b[j][1] = both[1]",
        "b[j][0] = both[1], b[j][1] = both[0]",
    ),
    Mutant(
        "wrong matrix for the second column tile",
        MATH,
        "lane % 8 + lane / 16 * 8, lane / 8 % 2)",
        "lane % 8 + lane / 8 % 2 * 8, lane / 16)",
    ),
    Mutant(
        "A fragment rows exchanged",
        MATH,
        "swizzled(warp_m + lane % 16, lane / 16)",
        "swizzled(warp_m + (lane ^ 8) % 16, lane / 16)",
    ),
    Mutant("second K half not reached", MATH, "const int flip = k * 32;", "const int flip = k * 0;"),
    Mutant("sums staged in the wrong half", MATH, "(row + half * 8) * kPitch", "(row + (1 - half) * 8) * kPitch"),
    Mutant("no rounding to tf32", MATH, "a[i][r] = device::round_tf32(a[i][r]);", ";"),
    Mutant(
        "fp32 form multiplies a row twice",
        MATH,
        "stage + (a_at + i * kLanesM * kRowBytes)",
        "stage + (a_at + i / 2 * kLanesM * kRowBytes)",
    ),
    Mutant("chunks not swizzled", LOADER, "((chunk ^ (row >> 1)) & (kChunks - 1))", "(chunk & (kChunks - 1))"),
    Mutant("swizzle period wrong", LOADER, "((chunk ^ (row >> 1)) & (kChunks - 1))", "((chunk ^ row) & (kChunks - 1))"),
    Mutant(
        "staged rows without padding",
        MATH,
        "static constexpr int kPitch = C::kWarpN + 8;",
        "static constexpr int kPitch = C::kWarpN;",
    ),
    Mutant(
        "dilation forgotten",
        LOADER,
        "to_next_tap_ = p.dilation.w * p.xs.w * kSize - read;",
        "to_next_tap_ = p.xs.w * kSize - read;",
    ),
    Mutant(
        "next tap row starts a tap late", LOADER, "(p.kernel.w - 1) * p.dilation.w", "(p.kernel.w - 2) * p.dilation.w"
    ),
    Mutant(
        "32-bit offset of the sample",
        LOADER,
        "const int64_t n = sample_of<T>(p.x_rows, entry);\n      const int64_t at = n * p.xs.n",
        "const int64_t n = sample_of<T>(p.x_rows, entry);\n      const int64_t at = static_cast<int32_t>(n * p.xs.n)",
    ),
    Mutant(
        "output row list ignored",
        EPILOGUE,
        "place.v[0] = sample * p.ys.n",
        "place.v[0] = int64_t{entry} * p.ys.n",
    ),
    Mutant(
        "table row of the entry, not the sample",
        EPILOGUE,
        "p.table_row + sample_of<T>(p.x_rows, entry)",
        "p.table_row + entry",
    ),
    Mutant(
        "group's weights of the wrong group",
        LOADER,
        "static_cast<int64_t>(tile.group) * p.group_rows",
        "static_cast<int64_t>(tile.group) * tile.part.c_out",
    ),
    Mutant("device count ignored", CONV, "    if (p.count) tile.part.count = device::load<int32_t>(p.count);\n", ""),
    Mutant("first entry of a part ignored", LOADER, "entry = tile.part.first + m / pixels;", "entry = m / pixels;"),
    Mutant(
        "residual after the activation",
        EPILOGUE,
        "e < active_ ? activate(v.v[e], p_.act) : 0.0f",
        "e < active_ ? activate(v.v[e] + 0.0f, p_.residual ? Act::None : p_.act) : 0.0f",
    ),
    Mutant("relu6 without its upper end", EPILOGUE, "v < 0.0f ? 0.0f : v > 6.0f ? 6.0f : v;", "v < 0.0f ? 0.0f : v;"),
    # compact
    Mutant(
        "compact: no barrier before the counts are read",
        COMPACT,
        "static_cast<int32_t>(device::popcount(votes)));\n    device::sync();",
        "static_cast<int32_t>(device::popcount(votes)));",
    ),
    Mutant(
        "compact: no barrier before the counts are written again",
        COMPACT,
        "    device::sync();  // the counts",
        "    // the counts",
    ),
    Mutant("compact: a lane counts itself", COMPACT, "(1u << lane) - 1u", "(2u << lane) - 1u"),
    Mutant("compact: the last row dropped", COMPACT, "row < n &&", "row < n - 1 &&"),
    Mutant("compact: -0.0 kept", COMPACT, " & magnitude) != 0;", ") != 0;"),
    Mutant(
        "compact: the last dropped row lost", COMPACT, "rows + (n - 1 - (row - before))", "rows + (n - (row - before))"
    ),
    # Block skipping in the convolution
    Mutant(
        "gate of the entry, not the sample", EPILOGUE, "load<float>(p.gate + sample)", "load<float>(p.gate + entry)"
    ),
    Mutant("gate blends with nothing", EPILOGUE, "(1.0f - gate) * device::to_float(place.residual.v[e])", "0.0f"),
    Mutant(
        "bias after the factor",
        EPILOGUE,
        "(p_.bias + (bias_ + e)), scale_[e], shift_[e])",
        "(p_.bias + (bias_ + e)), 1.0f, shift_[e])",
    ),
    Mutant(
        "bias of the running part, not of the layer",
        EPILOGUE,
        "bias_ = tile.group * p.group_rows + n;",
        "bias_ = channel_;",
    ),
    Mutant(
        "kept samples copied too", CONV, "const int32_t entry = done + id / pieces", "const int32_t entry = id / pieces"
    ),
    Mutant("the last piece copied whole", CONV, "begin + kPiece < size ? begin + kPiece : size", "begin + kPiece"),
    Mutant(
        "16-byte copies of samples that are no whole chunks", CONV, "if (p.wide_y && p.wide_residual) {", "if (true) {"
    ),
    Mutant(
        "copies from the entry, not the sample", CONV, "sample_of<T>(p.residual_rows, entry) * p.rs.n", "entry * p.rs.n"
    ),
    # schedule
    Mutant(
        "schedule: no barrier before the counts are read", SCHEDULE, "      device::sync();  // what", "      // what"
    ),
    Mutant("schedule: no turns", SCHEDULE, "turn % 2 * kMostScheduleWarps", "0"),
    Mutant(
        "schedule: classes found twice", SCHEDULE, "held[r] < now && held[r] > best", "held[r] <= now && held[r] > best"
    ),
    Mutant("schedule: low words of narrower classes", SCHEDULE, "value >> 32 == high ?", "true ?"),
    Mutant("schedule: places of the warps before forgotten", SCHEDULE, "lane < warp ? theirs.v[0] : 0u", "0u"),
    Mutant("schedule: places of the samples before forgotten", SCHEDULE, "at += device::popcount(votes[r]);", ""),
    Mutant("schedule: the first chunk held for all", SCHEDULE, "if (now == kNone || !held_all)", "if (now == kNone)"),
    Mutant(
        "indices: the high word ignored",
        INDICES,
        "return high > 0 || low < 0 || low > most ? most : low;",
        "return low < 0 || low > most ? most : low;",
    ),
    Mutant("indices: negative widths are wide", INDICES, "if (high < 0) return 0;", ""),
    Mutant("schedule: a part begins where the last one did", SCHEDULE, "first, placed - first}", "0, placed - first}"),
    Mutant("indices: narrow lists read as wide ones", INDICES, "list.wide ? load", "true ? load"),
    # depthwise
    Mutant("depthwise: no wait for the copies", DEPTHWISE, "    device::copy_wait<0>();\n", ""),
    Mutant(
        "depthwise: no barrier before the tile is read",
        DEPTHWISE,
        "    device::copy_wait<0>();\n    device::sync();",
        "    device::copy_wait<0>();",
    ),
    Mutant("depthwise: no barrier between tiles", DEPTHWISE, "    device::sync();  // the next", "    // the next"),
    Mutant("depthwise: the last row of the map not read", DEPTHWISE, "h < p_.in.h &&", "h < p_.in.h - 1 &&"),
    Mutant("depthwise: left padding read", DEPTHWISE, "w >= 0 && w < p_.in.w", "w >= -1 && w < p_.in.w"),
    Mutant(
        "depthwise: whole chunks past the channels",
        DEPTHWISE,
        "mine < 0 ? 0 : mine < kPer ? mine : kPer",
        "mine < 0 ? 0 : kPer",
    ),
    Mutant("depthwise: filters past the width read", DEPTHWISE, "tap < taps && channel < active_", "tap < taps"),
    Mutant(
        "depthwise: halves of a filter exchanged",
        DEPTHWISE,
        "to[half * 4 + e] = four.v[e];",
        "to[(half ^ 1) % (kPer / 4) * 4 + e] = four.v[3 - e];",
    ),
    Mutant(
        "depthwise: filters in order of channels",
        DEPTHWISE,
        "channel % kPer / 4 * (kLanesOfPixel * 4) + channel / kPer * 4 + channel % 4",
        "channel",
    ),
    Mutant("depthwise: window one column off", DEPTHWISE, "in[o + kw][e], f[e]", "in[o + 2 - kw][e], f[e]"),
    Mutant("depthwise: dilation forgotten", DEPTHWISE, "kw * p_.dilation.w, in)", "kw, in)"),
    Mutant(
        "depthwise: width of the neighbour",
        DEPTHWISE,
        "device::entry_of(p_.c_in, n_, channels)",
        "device::entry_of(p_.c_in, 0, channels)",
    ),
    Mutant(
        "depthwise: tails not zeroed",
        DEPTHWISE,
        "const int32_t stored = active > zeros ? active : zeros;",
        "const int32_t stored = active;",
    ),
    Mutant("depthwise: columns past the map stored", DEPTHWISE, "      if (o >= columns) break;\n", ""),
    Mutant(
        "depthwise: filters of the tile before", DEPTHWISE, "if (first_ == filters_of_ &&", "if (filters_of_ >= 0 &&"
    ),
    Mutant("depthwise: filters of a narrower sample", DEPTHWISE, "&& active_ == filters_active_)", ")"),
    Mutant(
        "depthwise: no turn to the next row",
        DEPTHWISE,
        "++h, w -= under_.w, from = from + turn;",
        "++h, w -= under_.w;",
    ),
    Mutant("depthwise: rows past the map stored", DEPTHWISE, "if (h_ + row_ < p_.out.h) outputs();", "outputs();"),
    # lookup
    Mutant("codes past the book read", CODES, "to[n] >= codes.entries ? codes.entries - 1 : to[n]", "to[n]"),
    Mutant("negative codes read", CODES, "to[n] = to[n] < 0 ? 0 : ", "to[n] = "),
    Mutant(
        "signed codes read as unsigned",
        CODES,
        "to[n] = device::load<int16_t>",
        "to[n] = (uint16_t)device::load<int16_t>",
    ),
    Mutant("lookup: padding looked up", LOOKUP, "        if (row == p.padding) continue;\n", ""),
    Mutant(
        "lookup: padding counted in the mean", LOOKUP, "static_cast<float>(kept)", "static_cast<float>(end - begin)"
    ),
    Mutant("lookup: weight of the row, not of the index", LOOKUP, "(p.weights + i)", "(p.weights + row)"),
    Mutant("lookup: only the first stage", LOOKUP, "stage < p.stages; ++stage", "stage < 1; ++stage"),
    Mutant("lookup: every stage from the first book", LOOKUP, "p.book_per_stage ? stage : 0", "0"),
    Mutant(
        "lookup: a bag one row too long",
        LOOKUP,
        "for (int32_t i = begin; i < end; ++i) {",
        "for (int32_t i = begin; i <= end && i < p.count; ++i) {",
    ),
    Mutant(
        "lookup: last bag ends with its first row",
        LOOKUP,
        "(p.offsets, bag + 1, p.count) : p.count",
        "(p.offsets, bag + 1, p.count) : begin + 1",
    ),
    Mutant(
        "lookup: wide rows end after one chunk a lane",
        LOOKUP,
        "at < width; at += 32 * kPer",
        "at < width && at < 32 * kPer; at += 32 * kPer",
    ),
    # decode
    Mutant("decode: taps and channels exchanged", DECODE, "at % p.channels * p.taps + tap", "at"),
    Mutant("decode: the entry does not go on", DECODE, "if (element >= p.d) element -= p.d, ++position;", ""),
    Mutant(
        "decode: the element stays past its entry",
        DECODE,
        "if (element >= p.d) element -= p.d, ++position;",
        "if (element >= p.d) ++position;",
    ),
    Mutant("decode: only the first stage", DECODE, "stage < p.stages; ++stage", "stage < 1; ++stage"),
    Mutant("decode: every stage from the first book", DECODE, "p.book_per_stage ? stage : 0", "0"),
    Mutant("decode: every position from the first book", DECODE, "p.book_per_position ? position : ", ""),
    Mutant("decode: factor of the first row", DECODE, "(p.scale + row)", "(p.scale + 0)"),
    Mutant("decode: rows end after one round", DECODE, "if (at < width)", "if (round == 0 && at < width)"),
    Mutant("decode: the last round goes past the row", DECODE, "if (at < width)", "if (true)"),
    Mutant("decode: rounds past the last of a row", DECODE, "if (round >= rounds) round -= rounds, ++row;", ""),
    Mutant(
        "decode: blocks make the same rows",
        DECODE,
        "static_cast<int32_t>(device::block()) * kDecodeWarps + device::thread() / 32;",
        "device::thread() / 32;",
    ),
    # dots
    Mutant(
        "dots: no barrier before x is overwritten",
        DOTS,
        "device::sync();  // all are done with the segment before",
        ";",
    ),
    Mutant("dots: no barrier after x", DOTS, "bring_x(segment);\n        device::sync();", "bring_x(segment);"),
    Mutant("dots: x of the rows before", DOTS, "id / groups == before", "before >= 0"),
    Mutant("dots: codes past the book read", DOTS, "value < p_.codes.entries ? value : p_.codes.entries - 1", "value"),
    Mutant("dots: negative codes read as the last", DOTS, "p_.codes.has_sign && code >= 0x8000u", "false"),
    Mutant("dots: codes past the row multiplied", DOTS, ">= left) return;", ">= left + 1) return;"),
    Mutant("dots: a code too few", DOTS, ">= left) return;", ">= left - 1) return;"),
    Mutant("dots: codes past the row read", DOTS, "if (left > 0) to[o] =", "to[o] ="),
    Mutant("dots: codes of outputs past the last read", DOTS, "output_ + o < p_.outputs ?", "true ?"),
    Mutant("dots: outputs past the last stored", DOTS, "lane_ != 0 || output >= p_.outputs", "lane_ != 0"),
    Mutant("dots: every lane stores", DOTS, "lane_ != 0 || output >= p_.outputs", "output >= p_.outputs"),
    Mutant("dots: half of a team not summed", DOTS, "bits = p_.lanes / 2; bits > 0", "bits = p_.lanes / 2; bits > 1"),
    Mutant("dots: the next segment's codes lost", DOTS, "codes[o] = next[o];", "codes[o] = codes[o];"),
    Mutant("dots: lanes without padding between their x", DOTS, "a_lane_ * chunks_ + 1;", "a_lane_ * chunks_;"),
    Mutant("dots: all lanes read one copy of the book", DOTS, "device::lane() % p.copies", "0"),
    Mutant("dots: rows past the last read", DOTS, "p_.rows - first_ < kM ? p_.rows - first_ : kM", "kM"),
    Mutant("dots: x of the first rows", DOTS, "((first_ + m) * p_.x_row", "(m * p_.x_row"),
    Mutant(
        "dots: entries of one chunk", DOTS, "(entry[o] * chunks_ + c) * p_.copies", "entry[o] * chunks_ * p_.copies"
    ),
    Mutant("dots: bias before the factor", DOTS, "device::fma(sums[o][m], scale, bias)", "(sums[o][m] + bias) * scale"),
    # dots_mma
    Mutant("dots_mma: no barrier after the book", DOTS_MMA, "device::sync();  // the book is there", ";  // the book"),
    Mutant("dots_mma: no barrier after the sums", DOTS_MMA, "keep(sums);\n    device::sync();", "keep(sums);"),
    Mutant("dots_mma: the next segment's codes lost", DOTS_MMA, "codes[i][0] = next_codes[i][0],", ""),
    Mutant("dots_mma: the next x lost", DOTS_MMA, "x[step][0] = next_x[step][0];", ";"),
    Mutant(
        "dots_mma: the next x of many rows lost",
        DOTS_MMA,
        "bring_x<kSteps>(next_segment, step, next_chunk, x[step]);",
        ";",
    ),
    Mutant(
        "dots_mma: the next x of many rows a step late",
        DOTS_MMA,
        "step, next_chunk, x[step]);",
        "step, next_chunk, x[(step + 1) % kSteps]);",
    ),
    Mutant(
        "dots_mma: the first eight rows of x for all",
        DOTS_MMA,
        "b[2] = {x[eight].v[2 * i], x[eight]",
        "b[2] = {x[0].v[2 * i], x[0]",
    ),
    Mutant("dots_mma: the sums of eight rows for all", DOTS_MMA, "= sums[eight][(step", "= sums[0][(step"),
    Mutant(
        "dots_mma: eight rows' sums in one place",
        DOTS_MMA,
        "sum_at(warp_, eight * kDotsRows + part_",
        "sum_at(warp_, part_",
    ),
    Mutant(
        "dots_mma: eight rows of a block alone",
        DOTS_MMA,
        "first_row_ = tile * kRows,",
        "first_row_ = tile * kDotsRows,",
    ),
    Mutant(
        "dots_mma: a part of the rows stored", DOTS_MMA, "i < kRows * kOutputs; i +=", "i < kDotsRows * kOutputs; i +="
    ),
    Mutant(
        "dots_mma: x of the next segment too early",
        DOTS_MMA,
        "next_segment = last ? segment + kMmaWarps : segment,",
        "next_segment = segment + kMmaWarps,",
    ),
    Mutant("dots_mma: the first chunk of x alone", DOTS_MMA, "next_chunk = last ? 0 : c + 1;", "next_chunk = 0;"),
    Mutant("dots_mma: codes of outputs past the last read", DOTS_MMA, "output < p_.outputs ? output", "true ? output"),
    Mutant("dots_mma: codes past the row read", DOTS_MMA, "if (position >= p_.positions) continue;", ""),
    Mutant("dots_mma: segments past the row read", DOTS_MMA, "if (segment < segments_)", "if (true)"),
    Mutant("dots_mma: rows past the last read", DOTS_MMA, "row >= p_.rows || position", "position"),
    Mutant("dots_mma: x past the row read", DOTS_MMA, "row >= p_.rows || position >= p_.positions", "row >= p_.rows"),
    Mutant(
        "dots_mma: x of the first rows",
        DOTS_MMA,
        "row = first_row_ + eight * kDotsRows + group_;",
        "row = eight * kDotsRows + group_;",
    ),
    Mutant("dots_mma: x not in chunks read as such", DOTS_MMA, "if (p_.wide_x)", "if (true)"),
    Mutant("dots_mma: all lanes store one copy first", DOTS_MMA, "copy + turn", "copy"),
    Mutant(
        "dots_mma: no entry of zeros", DOTS_MMA, "device::store(at_chunk(p_.codes.entries * chunks_, i), Chunk{});", ";"
    ),
    Mutant("dots_mma: codes past the row looked up", DOTS_MMA, "entry = p_.codes.entries;", ";"),
    Mutant(
        "dots_mma: codes past the book read",
        DOTS_MMA,
        "entry = entry < p_.codes.entries ? entry : p_.codes.entries - 1;",
        ";",
    ),
    Mutant("dots_mma: negative codes read as the last", DOTS_MMA, "p_.codes.has_sign && code >= 0x8000u", "false"),
    Mutant("dots_mma: all lanes read one copy of the book", DOTS_MMA, "device::lane() & (p_.copies - 1)", "0"),
    Mutant("dots_mma: the first chunk of an entry", DOTS_MMA, "entry * chunks_ + c,", "entry * chunks_,"),
    Mutant(
        "dots_mma: outputs eight apart exchanged",
        DOTS_MMA,
        "(low), below = device::load<Chunk>(high)",
        "(high), below = device::load<Chunk>(low)",
    ),
    Mutant(
        "dots_mma: half of the sums", DOTS_MMA, "sums[i][eight][0][r] + sums[i][eight][1][r]", "sums[i][eight][0][r]"
    ),
    Mutant("dots_mma: sums of the first tile", DOTS_MMA, "i * 16 + r / 2 * 8 + group_)", "r / 2 * 8 + group_)"),
    Mutant("dots_mma: warps' sums in one place", DOTS_MMA, "(warp * kRows + row)", "row"),
    Mutant(
        "dots_mma: the last warp's sums left out", DOTS_MMA, "warp < kMmaWarps; ++warp", "warp < kMmaWarps - 1; ++warp"
    ),
    Mutant("dots_mma: rows past the last stored", DOTS_MMA, "first_row_ + row >= p_.rows || ", ""),
    Mutant("dots_mma: outputs past the last stored", DOTS_MMA, " || output >= p_.outputs) continue;", ") continue;"),
    Mutant("dots_mma: bias before the factor", DOTS_MMA, "device::fma(sum, scale, bias)", "(sum + bias) * scale"),
    # stage
    Mutant("stage: no wait for weights", STAGE, "device::copy_wait<kStages - 2>();", ";"),
    Mutant(
        "stage: wait leaves one group too many",
        STAGE,
        "device::copy_wait<kStages - 2>();",
        "device::copy_wait<kStages - 1>();",
    ),
    Mutant(
        "stage: no barrier before weights are read",
        STAGE,
        "device::sync();  // the stage is there",
        ";  // the stage is there",
    ),
    Mutant(
        "stage: next weights brought before the barrier",
        STAGE,
        "device::sync();  // the stage is there for all, and all are done with the one before it, "
        "which is filled next\n"
        "        if (turn == kLast / kPartsOfTurn && part == kLast % kPartsOfTurn) weights_ = next;\n"
        "        bring_weights(to_);",
        "if (turn == kLast / kPartsOfTurn && part == kLast % kPartsOfTurn) weights_ = next;\n"
        "        bring_weights(to_), device::sync();",
    ),
    Mutant(
        "stage: no barrier before the map is written",
        STAGE,
        "device::copy_wait<0>();\n    device::sync();",
        "device::copy_wait<0>();",
    ),
    Mutant("stage: copies left behind", STAGE, "device::copy_wait<0>();\n    device::sync();", "device::sync();"),
    Mutant("stage: the border is not cleared", STAGE, "    clear_border();\n", ""),
    Mutant("stage: the last row is no border", STAGE, "pixel < pixels - row &&", "true &&"),
    Mutant("stage: the column between rows is no border", STAGE, " && pixel % row != 0) continue;", ") continue;"),
    Mutant("stage: both maps in one place", STAGE, "(second ? bytes_ : 0)", "0"),
    Mutant("stage: dropped blocks run", STAGE, "keep_of(lane) != 0.0f", "true"),
    Mutant("stage: blocks past the last one run", STAGE, "lane < p_.blocks && keep_of", "keep_of"),
    Mutant("stage: weights of dropped blocks brought", STAGE, "    ahead_ = kept;\n", "    ahead_ = kept | 1;\n"),
    Mutant("stage: only the first block runs", STAGE, "      kept &= kept - 1;\n", "      kept = 0;\n"),
    Mutant(
        "stage: the first block that is kept is the last", STAGE, "popcount(~bits & (bits - 1))", "popcount(bits - 1)"
    ),
    Mutant("stage: mask of the first sample", STAGE, "(sample_ * p_.keep_row + block)", "(block)"),
    Mutant("stage: hard masks blend", STAGE, "p_.soft ? keep_of(block) : 1.0f", "keep_of(block)"),
    Mutant("stage: gate blends with nothing", STAGE, "(1.0f - gate) * residual.v[e]", "0.0f"),
    Mutant(
        "stage: residual after the activation",
        STAGE,
        "clipped(sum.v[e] + bias[j].v[e] + residual.v[e])",
        "clipped(sum.v[e] + bias[j].v[e]) + residual.v[e]",
    ),
    Mutant("stage: first bias twice", STAGE, "2 * block + (second ? 1 : 0)] + (sums", "2 * block] + (sums"),
    Mutant(
        "stage: second weight is the first",
        STAGE,
        "p_.weight[2 * block + (ahead_second_ ? 1 : 0)]",
        "p_.weight[2 * block]",
    ),
    Mutant("stage: parts of a weight not counted", STAGE, "    weights_.at = weights_.at + kTaps * kC;\n", ""),
    Mutant("stage: weights aimed at one part late", STAGE, "(kParts - kAhead % kParts) % kParts", "kParts - 1"),
    Mutant(
        "stage: a thread's rows of weights are one",
        STAGE,
        "weights_.at + (row % kC * 9 + row / kC) * kC",
        "weights_.at",
    ),
    Mutant("stage: last copies of a part by all threads", STAGE, "(i + 1) * kRowsAtOnce <= kTaps * kC ||", "true ||"),
    Mutant("stage: taps not moved", STAGE, "(map + part * kPitch,", "(map,"),
    Mutant("stage: rows of taps not moved", STAGE, "      map = map + map_.row();\n", ""),
    Mutant("stage: rows without the column between", STAGE_MATH, "return (w + 1) * pitch;", "return w * pitch;"),
    Mutant(
        "stage: ring one stage short",
        STAGE,
        "from_ + kStageBytes < kStages * kStageBytes",
        "from_ + 2 * kStageBytes < kStages * kStageBytes",
    ),
    Mutant("stage: ring of constants out of step", STAGE, "(part + kAhead) % kStages", "(part + 1) % kStages"),
    Mutant("stage: wide copies of maps that are not aligned", STAGE, "if (p_.wide_x) {", "if (true) {"),
    Mutant("stage: sums not cleared", STAGE, "    sums.clear();\n", ""),
    Mutant(
        "stage: pixels past the map stored",
        STAGE_MATH,
        "        if (pixel >= map_.pixels()) continue;\n",
        "",
    ),
    Mutant("stage: tiles past the map multiplied", STAGE_MATH, "    if (first_ >= map_.pixels()) return;\n", ""),
    Mutant(
        "stage: rows past the map read",
        STAGE_MATH,
        "(pixel < map.pixels() ? map.place(pixel) : 0) + half_of_pixels()",
        "map.place(pixel) + half_of_pixels() + 4096",
    ),
    Mutant("stage: fragment halves exchanged", STAGE_MATH, "low[2] = {b[0], b[1]}", "low[2] = {b[1], b[0]}"),
    Mutant(
        "stage: second half of K not reached",
        STAGE_MATH,
        "map + a_[i] + (tap * kPitch + k * 32)",
        "map + a_[i] + tap * kPitch",
    ),
    Mutant("stage: taps of a row not told apart", STAGE_MATH, "map + a_[i] + (tap * kPitch + k", "map + a_[i] + (k"),
    Mutant(
        "stage: rows of a fragment exchanged",
        STAGE_MATH,
        "i * 16 + device::lane() % 16;",
        "i * 16 + (device::lane() ^ 8) % 16;",
    ),
    Mutant(
        "stage: sums of the other half",
        STAGE_MATH,
        "i * 16 + device::lane() / 4 + half * 8",
        "i * 16 + device::lane() / 4 + (1 - half) * 8",
    ),
    Mutant("stage: columns of the other half", STAGE_MATH, "first + half * 8 +", "first + (1 - half) * 8 +"),
    Mutant("stage: columns past the map stored", STAGE_MATH, "return {0, kRows};", "return {0, 0};"),
    Mutant("stage: rows below the map read", STAGE_MATH, "y < map_.h - rows_ ? y : map_.h - rows_", "y"),
    Mutant("stage: rows of two columns stored twice", STAGE_MATH, "        if (i < out_[half].first) continue;\n", ""),
    Mutant("stage: columns past the map multiplied", STAGE_MATH, ">= map.h) rows_ = 0;", ">= map.h) rows_ = rows_;"),
    Mutant(
        "stage: taps below a column's last output lost",
        STAGE_MATH,
        "add<1>(i, a[i % 2], b);",
        "add<2>(i, a[i % 2], b);",
    ),
    Mutant(
        "stage: inputs of one row for all",
        STAGE_MATH,
        "add_rows<i + 1>(at + map_.row(), a, b);",
        "add_rows<i + 1>(at, a, b);",
    ),
    Mutant("stage: rows of taps exchanged", STAGE_MATH, "b[row * 3 + tap][k]", "b[(2 - row) * 3 + tap][k]"),
    Mutant("stage: no rounding to tf32", STAGE_MATH, "to[r] = device::round_tf32(to[r]);", ";"),
    Mutant(
        "stage: fp32 form multiplies a chunk twice", STAGE_MATH, "add(a + chunk * 16, b", "add(a + chunk / 2 * 32, b"
    ),
    Mutant("stage: fp32 form without rows of taps", STAGE_MATH, "tap / 3 * map_.row() + tap % 3", "tap % 3"),
    Mutant(
        "stage: pixels without padding",
        STAGE_MATH,
        "kStagePitch = kC * static_cast<int>(sizeof(T)) + 16;",
        "kStagePitch = kC * static_cast<int>(sizeof(T));",
    ),
    # wgrad
    Mutant("wgrad: no wait for the stage's copies", WGRAD, "device::copy_wait<C::kStages - 2>();", ";"),
    Mutant(
        "wgrad: wait leaves one group too many",
        WGRAD,
        "device::copy_wait<C::kStages - 2>();",
        "device::copy_wait<C::kStages - 1>();",
    ),
    Mutant("wgrad: no barrier before a stage is multiplied", WGRAD, "device::sync();  // the stage", ";  // the stage"),
    Mutant(
        "wgrad: next stage filled before the barrier",
        WGRAD,
        "device::sync();  // the stage is there for all, and all are done with the one before it, "
        "which is filled next\n    if (ahead > 0) loader.load(fill);",
        "if (ahead > 0) loader.load(fill);\n    device::sync();",
    ),
    Mutant("wgrad: one stage of pixels too few", WGRAD, "ahead > 1 - C::kStages", "ahead > 2 - C::kStages"),
    Mutant("wgrad: the stage being multiplied is filled", WGRAD, "    fill = full;\n", ""),
    Mutant("wgrad: slices write the first one's sums", WGRAD, "(static_cast<int64_t>(tile.slice) * p.groups", "(0"),
    Mutant("wgrad: groups write the first one's sums", WGRAD, "+ tile.group) * p.c_out", ") * p.c_out"),
    Mutant(
        "wgrad: pixels past the slice read",
        WGRAD_LOADER,
        "left_ = tile.pixels - row;",
        "left_ = 1 << 30;",
    ),
    Mutant("wgrad: pixels past the slice read in x", WGRAD_LOADER, "live ? y_ : kNowhere", "y_"),
    Mutant("wgrad: a pixel too many", WGRAD_LOADER, "const bool live = left_ > 0;", "const bool live = left_ >= 0;"),
    Mutant(
        "wgrad: lower padding read",
        WGRAD_LOADER,
        "(y + down_[i]) < static_cast<uint32_t>(p_.in.h)",
        "(y + down_[i]) <= static_cast<uint32_t>(p_.in.h)",
    ),
    Mutant(
        "wgrad: left padding read",
        WGRAD_LOADER,
        "static_cast<uint32_t>(x_ + right_[i]) < static_cast<uint32_t>(p_.in.w)",
        "x_ + right_[i] < p_.in.w",
    ),
    Mutant(
        "wgrad: columns past the last tap read", WGRAD_LOADER, "there ? tap / p.kernel.w", "true ? tap / p.kernel.w"
    ),
    Mutant("wgrad: inputs past the width read", WGRAD_LOADER, "b_left_[i] = p.c_in - c;", "b_left_[i] = kPer;"),
    Mutant("wgrad: outputs past the width read", WGRAD_LOADER, "a_left_ = p.c_out - m;", "a_left_ = C::kTileM;"),
    Mutant(
        "wgrad: tiles of few outputs copied whole",
        WGRAD_LOADER,
        "partial_ = p.c_in % kPer != 0 || p.c_out < tile.m + C::kTileM || ",
        "partial_ = p.c_in % kPer != 0 || ",
    ),
    Mutant(
        "wgrad: partial chunks of x copied whole",
        WGRAD_LOADER,
        "partial_ = p.c_in % kPer != 0 || p.c_out",
        "partial_ = p.c_out",
    ),
    Mutant("wgrad: dilation forgotten", WGRAD_LOADER, "tap % p.kernel.w * p.dilation.w", "tap % p.kernel.w"),
    Mutant("wgrad: end of a row missed", WGRAD_LOADER, "if (x_ >= end_.w)", "if (x_ > end_.w)"),
    Mutant("wgrad: end of a map missed", WGRAD_LOADER, "if (y_ >= end_.h)", "if (y_ > end_.h)"),
    Mutant("wgrad: stride of the walk forgotten", WGRAD_LOADER, "y_ += p_.stride.h, a_", "y_ += 1, a_"),
    Mutant(
        "wgrad: samples not walked",
        WGRAD_LOADER,
        "samples_ = C::kDepth / p.out.w / p.out.h;",
        "samples_ = 0;",
    ),
    Mutant("wgrad: gz of the first group", WGRAD_LOADER, "static_cast<int64_t>(tile.group) * p.c_out", "0"),
    Mutant("wgrad: x of the first group", WGRAD_LOADER, "static_cast<int64_t>(tile.group) * p.c_in", "0"),
    Mutant(
        "wgrad: 32-bit offset of the row",
        WGRAD_LOADER,
        "static_cast<int64_t>(y_ - p.pad.h) * p.xs.h",
        "(int32_t)((y_ - p.pad.h) * p.xs.h)",
    ),
    Mutant("wgrad: odd chunks not exchanged", WGRAD_LOADER, "odd_ = -2 * swap * kFar;", "odd_ = 0;"),
    Mutant(
        "wgrad: swizzle without the high bit",
        WGRAD_LOADER,
        "return (row & 1) << 2 | (row & 2) | (row >> 2 & 1);",
        "return (row & 2) | (row >> 2 & 1);",
    ),
    Mutant(
        "wgrad: swizzle of the row as it is",
        WGRAD_LOADER,
        "return (row & 1) << 2 | (row & 2) | (row >> 2 & 1);",
        "return row & 7;",
    ),
    Mutant(
        "wgrad: A's halves exchanged",
        WGRAD_MATH,
        "a_ = (matrix / 2 * 8 + row) * C::kRowA + ((warp_m / 8 + matrix % 2) ^",
        "a_ = (matrix % 2 * 8 + row) * C::kRowA + ((warp_m / 8 + matrix / 2) ^",
    ),
    Mutant(
        "wgrad: B's halves exchanged",
        WGRAD_MATH,
        "(matrix % 2 * 8 + row) * C::kRowB + ((warp_n / 8 + matrix / 2) ^",
        "(matrix / 2 * 8 + row) * C::kRowB + ((warp_n / 8 + matrix % 2) ^",
    ),
    Mutant("wgrad: half of the pixels multiplied", WGRAD_MATH, "((b_ ^ j * 16) + k * C::kRowB)", "(b_ ^ j * 16)"),
    Mutant("wgrad: matrices not transposed", WGRAD_MATH, "load_matrix_x4_transposed(a[i]", "load_matrix_x4(a[i]"),
    Mutant("wgrad: tf32's second half of pixels lost", WGRAD_MATH, "(k + r * 4) * C::kRowB", "k * C::kRowB"),
    Mutant(
        "wgrad: no rounding to tf32",
        WGRAD_MATH,
        "device::round_tf32(device::load<uint32_t>(from))",
        "device::load<uint32_t>(from)",
    ),
    Mutant("wgrad: neighbours exchange the wrong sums", WGRAD_MATH, "odd ? s[0] : s[2]", "odd ? s[2] : s[0]"),
    Mutant("wgrad: odd lanes store the even ones' row", WGRAD_MATH, "(odd ? 8 : 0)", "0"),
    Mutant("wgrad: sums past the columns stored", WGRAD_MATH, "m < rows && n < columns", "m < rows"),
    Mutant("wgrad: sums past the rows stored", WGRAD_MATH, "m < rows && n < columns", "n < columns"),
    Mutant(
        "wgrad: fp32 form without its swizzle", WGRAD_MATH, "const int flip = reversed(k) * 16;", "const int flip = 0;"
    ),
    Mutant("wgrad: classes that do not reach the tile summed", WGRAD, "if (part.c_out <= m) break;", ""),
    Mutant("wgrad: class at the tile's edge left out", WGRAD, "part.c_out <= m)", "part.c_out <= m + 1)"),
    Mutant(
        "wgrad: last entry forgotten", WGRAD, "device::load<int32_t>(p.count);", "device::load<int32_t>(p.count) - 1;"
    ),
    Mutant("wgrad: first entry not looked up", WGRAD_LOADER, "if (C::kListed && left_ > 0) go_to(entry_);", ""),
    Mutant("wgrad: list read past its end", WGRAD_LOADER, "samples > 0 && left_ > 0)", "samples > 0)"),
    Mutant("wgrad: list walked one by one", WGRAD_LOADER, "go_to(entry_ + samples)", "go_to(entry_ + 1)"),
    Mutant("wgrad: gz of the first entry", WGRAD_LOADER, "a_ = a_ + by * p_.gs.n * kSize, b_", "b_"),
    Mutant("wgrad: widths counted twice", WGRAD_LOADER, "    in_ = in, out_ = out;\n", ""),
    Mutant("wgrad: widths not looked at", WGRAD_LOADER, " || (C::kListed && p.classes)", ""),
    Mutant("wgrad: inputs of the first entry", WGRAD_LOADER, "b_left_[i] += in - in_;", ";"),
    Mutant("wgrad: outputs of the first entry", WGRAD_LOADER, "a_left_ += out - out_;", ";"),
    # depthwise_wgrad
    Mutant("depthwise_wgrad: inputs a sample lacks", DEPTHWISE_WGRAD, "return in < out ? in : out;", "return out;"),
    Mutant("depthwise_wgrad: outputs a sample lacks", DEPTHWISE_WGRAD, "return in < out ? in : out;", "return in;"),
    Mutant("depthwise_wgrad: lower padding read", DEPTHWISE_WGRAD, "y < p.in.h &&", "y <= p.in.h &&"),
    Mutant("depthwise_wgrad: left padding read", DEPTHWISE_WGRAD, "&& at >= 0 &&", "&& at >= -1 &&"),
    Mutant("depthwise_wgrad: second group of taps is the first", DEPTHWISE_WGRAD, "% tap_groups * kTapsAtOnce", "* 0"),
    Mutant(
        "depthwise_wgrad: sums of absent taps stored",
        DEPTHWISE_WGRAD,
        "if (tap + t < taps && device::thread()",
        "if (device::thread()",
    ),
    Mutant(
        "depthwise_wgrad: slices overlap", DEPTHWISE_WGRAD, "(rest < p.slices.slice ? rest : p.slices.slice)", "rest"
    ),
    Mutant("depthwise_wgrad: absent channels stored", DEPTHWISE_WGRAD, "&& mine < p.groups)", ")"),
    Mutant("depthwise_wgrad: dilation forgotten", DEPTHWISE_WGRAD, "% p.kernel.w * p.dilation.w", "% p.kernel.w"),
    Mutant(
        "columns: no barrier before the lanes' sums are read",
        COLUMNS,
        "  sync();  // the lanes' values",
        "  // the lanes'",
    ),
    Mutant("columns: no barrier before the next sum", COLUMNS, "  sync();  // the next sum", "  // the next sum"),
    Mutant("columns: a lane forgotten", COLUMNS, "i < kColumnLanes; ++i) sum", "i < kColumnLanes - 1; ++i) sum"),
    Mutant("columns: chunks read past their channels", COLUMNS, "if (e < count) chunk", "chunk"),
    Mutant(
        "columns: whole chunks read where there are none",
        COLUMNS,
        "wide && count >= kPerChunk<T>) return",
        "wide) return",
    ),
    # block_grad, ragged_grad
    Mutant(
        "block_grad: dropped samples kept", BLOCK_GRAD, "const bool kept = mask != 0.0f;", "const bool kept = true;"
    ),
    Mutant("block_grad: hard masks blend", BLOCK_GRAD, "p.soft || !kept ? mask : 1.0f", "mask"),
    Mutant("block_grad: gate forgotten", BLOCK_GRAD, "through(gate * in,", "through(in,"),
    Mutant("block_grad: shortcut's part forgotten", BLOCK_GRAD, "device::fma(1.0f - gate, in, sum)", "sum"),
    Mutant("block_grad: dropped samples written", BLOCK_GRAD, "if (p.gz.at && kept)", "if (p.gz.at)"),
    Mutant(
        "columns: slices overlap",
        COLUMNS,
        "slices.rows - begin < slices.slice ? slices.rows : begin + slices.slice",
        "slices.rows",
    ),
    Mutant("pieces: sums of pieces in one place", PIECES, "* p.pieces + piece) *", "* p.pieces) *"),
    Mutant(
        "block_grad: no barrier before dots are added", BLOCK_GRAD, "device::sync();  // the channels' dots", ";  //"
    ),
    Mutant("block_grad: dots of groups in one place", BLOCK_GRAD, "place.groups + place.group;", "place.groups;"),
    Mutant("block_grad: dots without the shortcut", BLOCK_GRAD, " - device::to_float(old.v[e])", ""),
    Mutant("slope: 0 lets the gradient through", SLOPE, "return seen <= 0.0f ?", "return seen < 0.0f ?"),
    Mutant("slope: relu6 without its upper end", SLOPE, " || seen >= 6.0f", ""),
    Mutant("slope: hardswish without its lower end", SLOPE, "seen < -3.0f ? 0.0f : ", ""),
    Mutant("slope: silu of the gate alone", SLOPE, "device::fma(seen, 1.0f - gate, 1.0f)", "1.0f"),
    Mutant(
        "ragged_grad: channels a sample lacks",
        RAGGED_GRAD,
        "device::entry_of(p.c_out, sample, p.channels)",
        "p.channels",
    ),
    Mutant(
        "ragged_grad: factor forgotten", RAGGED_GRAD, "device::from_float<T>(v * scale[e])", "device::from_float<T>(v)"
    ),
    Mutant("ragged_grad: output not looked at", RAGGED_GRAD, "clips ? device::to_float(y.v[e]) : device", "device"),
    Mutant("ragged_grad: first row of the tables", RAGGED_GRAD, "p.table_row + sample) *", "p.table_row) *"),
    Mutant("ragged_grad: bias's sums without the factor", RAGGED_GRAD, "sums[e] *= scale[e];", ";"),
    Mutant(
        "ragged_grad: scale's sums without what it scales",
        RAGGED_GRAD,
        "fma(v, sum, products[e])",
        "fma(v, 1.0f, products[e])",
    ),
    Mutant("pieces: one map for all samples", PIECES, "row(static_cast<int64_t>(sample) * p.pixels)", "row(0)"),
    Mutant("fold_table: rows below", RAGGED_GRAD, "!= row) continue", "< row) continue"),
    Mutant("fold_table: first pieces alone", RAGGED_GRAD, "k < p.pieces;", "k < 1;"),
    Mutant(
        "fold_table: columns past the channels", RAGGED_GRAD, "channel < p.channels && n < p.samples", "n < p.samples"
    ),
    # book_grad
    Mutant(
        "book_grad: no order between lanes' groups", BOOK_GRAD, "device::sync_warp();  // codes may", ";  // codes may"
    ),
    Mutant("book_grad: groups add at once", BOOK_GRAD, "if (adds && group == g)", "if (adds && g == 0)"),
    Mutant("book_grad: entries of other warps added", BOOK_GRAD, "code >= 0 && code < count", "code < count"),
    Mutant("book_grad: table not cleared by its warp", BOOK_GRAD, "device::store(sums + i, 0.0f);", ";"),
    Mutant("book_grad: last codes forgotten", BOOK_GRAD, "base < items; base += 32", "base + 31 < items; base += 32"),
    Mutant("book_grad: codes past the slice", BOOK_GRAD, "if (base + lane < items) {", "{"),
    Mutant("book_grad: numbers past the row", BOOK_GRAD, " && at + k + part < of.columns;", ";"),
    Mutant(
        "book_grad: scale forgotten", BOOK_GRAD, "factor = device::load<float>(of.scale + coded);", "factor = 1.0f;"
    ),
    Mutant("book_grad: padding counted", BOOK_GRAD, "return row == of.padding ? -1 : row;", "return row;"),
    Mutant(
        "book_grad: bags not looked at",
        BOOK_GRAD,
        "of.bags.words ? device::entry_of(of.bags, i, of.value_rows - 1) : i",
        "i",
    ),
    Mutant(
        "book_grad: first elements of each block",
        BOOK_GRAD,
        "column = position * of.d + element,",
        "column = position * of.d,",
    ),
    Mutant("book_grad: one code of a turn", BOOK_GRAD, "mine &= mine - 1u;", ";"),
    Mutant("book_fold: sums in fp32", BOOK_GRAD, "double sum = 0.0;", "float sum = 0.0f;"),
    Mutant("row_dots: half of the lanes", BOOK_GRAD, "bits > 0; bits /= 2) dot", "bits > 1; bits /= 2) dot"),
    Mutant("row_dots: first stage alone", BOOK_GRAD, "stage < of.stages; ++stage", "stage < 1; ++stage"),
    # act_grad
    Mutant("act_grad: relu6 without its upper end", ACT_GRAD, "v <= 0.0f || v >= most", "v <= 0.0f"),
    Mutant("act_grad: relu with an upper end", ACT_GRAD, '__builtin_nanf("")', "3.0f"),
    Mutant("act_grad: 0 lets the gradient through", ACT_GRAD, "v <= 0.0f ||", "v < 0.0f ||"),
    Mutant("act_grad: NaN stops the gradient", ACT_GRAD, "v <= 0.0f ||", "!(v > 0.0f) ||"),
    Mutant("act_grad: sums before the slope", ACT_GRAD, "g.v[e] = T{};", "sums[e] -= 1.0f, g.v[e] = T{};"),
    Mutant("act_grad: rows past the slice", ACT_GRAD, "row < place.end;", "row < p.slices.rows;"),
    Mutant("act_grad: sums of one slice overwritten", ACT_GRAD, "static_cast<int64_t>(place.slice) * p.channels", "0"),
    # transpose
    Mutant(
        "transpose: no barrier before the tile is read", TRANSPOSE, "device::sync();  // the tile", ";  // the tile"
    ),
    Mutant("transpose: no barrier between tiles", TRANSPOSE, "device::sync();  // the next", ";  // the next"),
    Mutant("transpose: outputs past the part read", TRANSPOSE, "if (output + row < p.c_out && input", "if (input"),
    Mutant(
        "transpose: outputs past the part stored",
        TRANSPOSE,
        "input + row < p.c_in && output + column < p.c_out",
        "input + row < p.c_in",
    ),
    Mutant(
        "transpose: taps not turned round",
        BACKWARD,
        "taps_of(kernel.w, step.w, r.w) - 1 - tap.w / step.w",
        "tap.w / step.w",
    ),
    Mutant(
        "transpose: residues not sorted",
        BACKWARD,
        "const Size2 r{tap.h % step.h, tap.w % step.w};",
        "const Size2 r{0, 0};",
    ),
    Mutant("transpose: groups of the part, not of the weight", TRANSPOSE, "* p.group_rows * p.so", "* p.c_out * p.so"),
    # fold
    Mutant("fold: a slice forgotten", FOLD, "s < p.slices; ++s) {", "s < p.slices - 1; ++s) {"),
    Mutant("fold: outputs past the part not zeroed", FOLD, "group < p.groups && o < p.c_out", "group < p.groups"),
    Mutant("fold: inputs past the part not zeroed", FOLD, " && c < p.c_in) {", ") {"),
    Mutant("fold: groups past the part not zeroed", FOLD, "if (group < p.groups && o", "if (o"),
    Mutant(
        "fold: rows of the whole weight",
        FOLD,
        "static_cast<int64_t>(group) * p.c_out",
        "static_cast<int64_t>(group) * p.whole_rows",
    ),
    Mutant(
        "fold: the last thread of a round lost",
        FOLD,
        "step = static_cast<int64_t>(device::blocks()) * kFoldThreads;",
        "step = p.elements;",
    ),
    # batch norms
    Mutant(
        "bn: no barrier before the lanes' statistics are read",
        BN_FORWARD,
        "  device::sync();  // the lanes'",
        "  // the lanes'",
    ),
    Mutant(
        "bn: the last lane's statistics forgotten",
        BN_FORWARD,
        "int lane = 1; lane < device::kColumnLanes;",
        "int lane = 1; lane < device::kColumnLanes - 1;",
    ),
    Mutant(
        "bn: lanes counted as if all had as many rows",
        BN_FORWARD,
        "lane < rest ? each + 1 : each",
        "each + 1",
    ),
    Mutant(
        "bn: deviations from the old mean twice",
        BN_FORWARD,
        "device::fma(delta, v[e] - mean[e], squares[e])",
        "device::fma(delta, delta, squares[e])",
    ),
    Mutant(
        "bn: distance of means forgotten",
        BN_FORWARD,
        "device::fma(rows_of(lane) * away, away,",
        "device::fma(0.0f, away,",
    ),
    Mutant("bn: every branch's statistics are the first one's", BN_FORWARD, "p.maps.x[branch];", "p.maps.x[0];"),
    Mutant("bn: slices write the first one's statistics", BN_FORWARD, "+ place.slice) * 2", ") * 2"),
    Mutant(
        "bn: the last slice counted as whole",
        BN_FORWARD,
        "static_cast<double>(left < p.slices.slice ? left : p.slices.slice)",
        "static_cast<double>(p.slices.slice)",
    ),
    Mutant("bn: running variance biased", BN_FORWARD, "step * (variance * unbiased)", "step * variance"),
    Mutant(
        "bn: momentum the wrong way round",
        BN_FORWARD,
        "(1.0 - step) * old_mean + step * mean",
        "step * old_mean + (1.0 - step) * mean",
    ),
    Mutant("bn: no eps", BN_FORWARD, "device::sqrt(variance + p.eps)", "device::sqrt(variance)"),
    Mutant(
        "bn: shift of the last branch alone",
        BN_FORWARD,
        "shift += device::load<double>(of_terms()",
        "shift = device::load<double>(of_terms()",
    ),
    Mutant("bn: relu left out", BN_FORWARD, "p.relu && z[e] < 0.0f ? 0.0f : z[e]", "z[e]"),
    Mutant(
        "bn: second branch's factor for all",
        BN_FORWARD,
        "device::fma(scale[i][e], x",
        "device::fma(scale[i > 1 ? 1 : i][e], x",
    ),
    Mutant(
        "bn: no barrier before the vectors are read by the sums",
        BN_BACKWARD,
        "  device::sync();  // the vectors are there\n  float sums",
        "  float sums",
    ),
    Mutant(
        "bn: no barrier before the vectors are read by dx",
        BN_BACKWARD,
        "  device::sync();  // the vectors are there\n  if (place.count == 0) return;",
        "  if (place.count == 0) return;",
    ),
    Mutant("bn: gradient not masked", BN_BACKWARD, "p.relu && z[e] <= 0.0f ? 0.0f : g", "false ? 0.0f : g"),
    Mutant(
        "bn: mask without the shift", BN_BACKWARD, "take<T>(kShift, z);", "for (int e = 0; e < kPer; ++e) z[e] = 0.0f;"
    ),
    Mutant(
        "bn: sums not centred",
        BN_BACKWARD,
        "x[e] - mean[e], sums",
        "x[e], sums",
    ),
    Mutant(
        "bn: last branch's sums not stored",
        BN_BACKWARD,
        "if (i > of.maps.count) break;",
        "if (i >= of.maps.count) break;",
    ),
    Mutant(
        "bn: a slice of the sums forgotten",
        BN_BACKWARD,
        "place.there ? p.slices.count",
        "place.there ? p.slices.count - 1",
    ),
    Mutant(
        "bn: a row asked for and forgotten",
        BN_FORWARD,
        "row += kRowsAtOnce * device",
        "row += (1 + kRowsAtOnce) * device",
    ),
    Mutant(
        "bn: slices around no mean",
        BN_FORWARD,
        "parts + static_cast<int64_t>(s) * 2 * p.channels)) - mean;",
        "parts + static_cast<int64_t>(s) * 2 * p.channels));",
    ),
    Mutant(
        "bn: no barrier before the slices' sums are read",
        BN_FINISH,
        "  device::sync();  // the lanes'",
        "  // the lanes'",
    ),
    Mutant("bn: the last lane of slices forgotten", BN_FINISH, "i < kFinishLanes; ++i", "i < kFinishLanes - 1; ++i"),
    Mutant(
        "bn: no barrier before the shifts are read",
        BN_FORWARD,
        "  device::sync();  // the branches'",
        "  // the branches'",
    ),
    Mutant("bn: no barrier before dbias is read", BN_BACKWARD, "  device::sync();  // dbias", "  // dbias"),
    Mutant("bn: dx without the share of dbias", BN_BACKWARD, "-scale * (dbias - rounding", "-scale * (-rounding"),
    Mutant("bn: dx without the share of dweight", BN_BACKWARD, "static_cast<float>(-scale * invstd * dweight)", "0.0f"),
    Mutant("bn: dx in eval as in training", BN_BACKWARD, "p.training ? device::fma", "true ? device::fma"),
    Mutant("bn: dx written where it is not wanted", BN_BACKWARD, "      if (!p.dx[i].at) continue;\n", ""),
    Mutant("fold_sums: a slice forgotten", FOLD, "s < p.slices; ++s) sum", "s < p.slices - 1; ++s) sum"),
)
