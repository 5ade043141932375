// What the GPU's stage of skipped blocks (stage.cuh) is given, whether it can run, and what it costs.
#pragma once

#include <cstdint>
#include <limits>

#include "../common/cuda/stream.h"
#include "../conv/conv_gpu.h"

namespace effkern::block_skip {

using conv::gpu::Act;
using conv::gpu::Math;
using device::Global;

constexpr int kStageBlocks = 32;  // residual blocks of a launch

// Blocks of two 3x3 convolutions of as many channels. keep[n][blocks]: 0 drops a block of a sample, what lies between 0
// and 1 blends; `soft` false: everything but 0 keeps.
template <class T>
struct Stage {
  Global<const T> x;
  Global<T> y;
  conv::gpu::Strides xs, ys;
  bool wide_x, wide_y;  // 16 bytes at once
  int32_t samples, h, w, channels, blocks;
  Global<const float> keep;
  int64_t keep_row;
  bool soft;
  float low, high;                           // what activations are held to
  Global<const T> weight[2 * kStageBlocks];  // [channels][3][3][channels], dense, 16-byte aligned
  Global<const float> bias[2 * kStageBlocks];
};

// How a stage of some channels lies in shared memory. A pixel takes 16 bytes more than its channels, so that pixels
// side by side, and rows of a weight, begin on different banks.
struct StageShape {
  int32_t pitch, taps, stages;  // bytes of a pixel; taps of a stage of weights, and how many stages there are
  int32_t stage_bytes(int32_t channels) const { return taps * channels * pitch; }
};

inline StageShape stage_shape(int32_t channels, int32_t size) {
  return {channels * size + 16, channels == 16 ? 9 : channels == 32 ? 3 : 1, size == 2 ? 3 : 2};
}

// With 64 channels the map is small: fewer warps, each of more outputs, load fewer fragments in all.
EFFKERN_BOTH constexpr int stage_threads(int32_t channels) { return channels == 64 ? 128 : 256; }

// Pixels that the threads' sums hold.
EFFKERN_BOTH constexpr int32_t most_pixels(int32_t channels) {
  return channels == 16 ? 1024 : channels == 32 ? 256 : 64;
}

// With 16 channels that is eight rows of 128 columns: groups of rows lie side by side.
constexpr int32_t kMostRows = 8, kMostColumns = 128;
EFFKERN_BOTH int32_t rows_of_columns(int32_t h, int32_t w) {
  const int32_t groups = kMostColumns / w;
  return (h + groups - 1) / groups;
}

// A map with a border of zeros: a row above and below, and one column that ends a row and begins the next.
inline int32_t bordered(int32_t h, int32_t w) { return (h + 2) * (w + 1) + 1; }

// Two maps, and the ring of weights.
inline int64_t stage_shared(int32_t channels, int32_t size, int32_t h, int32_t w) {
  const StageShape s = stage_shape(channels, size);
  return int64_t{2} * bordered(h, w) * s.pitch + s.stages * s.stage_bytes(channels);
}

// The bounds of an activation that only clips; the others would make the kernel many times as long.
inline bool clips(Act act, float& low, float& high) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  low = act == Act::None ? -kInfinity : 0.0f, high = act == Act::Relu6 ? 6.0f : kInfinity;
  return act == Act::None || act == Act::Relu || act == Act::Relu6;
}

inline bool stage_fits(int64_t channels, int32_t size, int64_t h, int64_t w, int64_t limit) {
  if (channels != 16 && channels != 32 && channels != 64) return false;
  const auto c = static_cast<int32_t>(channels);
  if (h > most_pixels(c) || w > most_pixels(c) || h * w > most_pixels(c)) return false;
  const auto rows = static_cast<int32_t>(h), columns = static_cast<int32_t>(w);
  if (c == 16 && w > 0 && (w > kMostColumns || rows_of_columns(rows, columns) > kMostRows)) return false;
  return stage_shared(c, size, rows, columns) <= limit;
}

// Launches the kernel; x may be y.
void run(const Stage<device::F16>& stage, device::Stream stream);
void run(const Stage<device::BF16>& stage, device::Stream stream);
void run(const Stage<float>& stage, Math math, device::Stream stream);
int64_t most_stage_shared();  // of a block on the current device

// Bytes that the kernel's instructions move for samples that keep `kept` blocks in all, without masks and biases.
struct StageWork {
  int64_t bytes_x = 0, bytes_y = 0, bytes_weights = 0, macs = 0;
};

template <class T>
StageWork stage_work(const Stage<T>& p, int64_t kept) {
  const int64_t map = int64_t{p.h} * p.w * p.channels, weight = int64_t{9} * p.channels * p.channels;
  const int64_t size = sizeof(T);
  return {p.samples * map * size, p.samples * map * size, kept * 2 * weight * size, kept * 2 * p.h * p.w * weight};
}

}  // namespace effkern::block_skip
