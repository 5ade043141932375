// From the gradient at the output of a ragged convolution to that at its sums, with the sums that biases and tables
// want, in one pass. A block takes 128 bytes of channels of a piece of one sample, whose width and factors are then the
// same for all of its pixels.
//
// Traffic: gy once, y or z once, what is written once, a float a channel and piece.
#pragma once

#include "../common/cuda/indices.cuh"
#include "../common/cuda/pieces.cuh"
#include "../conv_backward/slope.cuh"
#include "ragged_grad.h"

namespace effkern::sliced_conv {

constexpr int kFoldTableThreads = 256;

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 5) ragged_grad(const __grid_constant__ RaggedGrad<T> p) {
  using conv::gpu::Act;
  constexpr int kPer = device::kPerChunk<T>;
  const device::PiecePlace<T> place(p);
  const int32_t sample = place.sample, channel = place.in.channel;
  const int32_t count = device::entry_of(p.c_out, sample, p.channels) - channel;
  const bool clips = p.act == Act::Relu || p.act == Act::Relu6, curved = !clips && p.act != Act::None;
  float scale[kPer], shift[kPer], sums[kPer] = {}, products[kPer] = {};
  const int64_t table = p.table_row ? device::load<int32_t>(p.table_row + sample) * p.table_stride + channel : 0;
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    scale[e] = p.scale && e < count ? device::load<float>(p.scale + (table + e)) : 1.0f;
    shift[e] = p.shift && e < count ? device::load<float>(p.shift + (table + e)) : 0.0f;
  }
  if (count > 0) {
    for (int32_t pixel = place.in.row; pixel < place.in.end; pixel += device::kColumnLanes) {
      const int64_t at = place.row + pixel;
      auto g = device::read_chunk<T>(p.gy.at + (at * p.gy.pitch + channel), count, p.wide);
      device::Vec<T, kPer> y{}, z{};
      if (clips) y = device::read_chunk<T>(p.y.at + (at * p.y.pitch + channel), count, p.wide);
      if (curved || p.by_scale) z = device::read_chunk<T>(p.z.at + (at * p.z.pitch + channel), count, p.wide);
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const float sum = device::to_float(z.v[e]);
        const float seen = clips ? device::to_float(y.v[e]) : device::fma(sum, scale[e], shift[e]);
        const float v = conv::gpu::through(device::to_float(g.v[e]), seen, p.act);
        sums[e] += v;
        products[e] = device::fma(v, sum, products[e]);
        g.v[e] = device::from_float<T>(v * scale[e]);
      }
      if (p.gz.at) device::write_chunk<T>(p.gz.at + (at * p.gz.pitch + channel), g, count, p.wide);
    }
  }
  // Sums by channel of a sample, so that its factor can be taken out of them.
  if (p.by_scale) place.store_sums(products, p, p.by_scale);
  if (p.by_shift) place.store_sums(sums, p, p.by_shift);
  if (p.by_bias) {
#pragma unroll
    for (int e = 0; e < kPer; ++e) sums[e] *= scale[e];
    place.store_sums(sums, p, p.by_bias);
  }
}

__global__ void __launch_bounds__(kFoldTableThreads, 4) fold_table(const __grid_constant__ FoldTable p) {
  const int64_t size = static_cast<int64_t>(p.rows) * p.columns;
  const int64_t step = static_cast<int64_t>(device::blocks()) * kFoldTableThreads;
  for (int64_t i = static_cast<int64_t>(device::block()) * kFoldTableThreads + device::thread(); i < size; i += step) {
    const int32_t row = static_cast<int32_t>(i / p.columns), channel = static_cast<int32_t>(i % p.columns);
    float sum = 0.0f;
    for (int32_t n = 0; channel < p.channels && n < p.samples; ++n) {
      if (device::load<int32_t>(p.table_row + n) != row) continue;
      const int64_t from = static_cast<int64_t>(n) * p.pieces * p.channels + channel;
      for (int32_t k = 0; k < p.pieces; ++k)
        sum += device::load<float>(p.sums + (from + static_cast<int64_t>(k) * p.channels));
    }
    device::store(p.to + i, sum);
  }
}

}  // namespace effkern::sliced_conv
