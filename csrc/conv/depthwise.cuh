// Depthwise convolution for sm_80 and later, bound by memory: a tile is 64 outputs of one sample times 128 bytes of
// channels. Asynchronous copies bring the input under it, halo included, into shared memory once; eight lanes hold a
// pixel's channels, 16 bytes each, so that accesses to both memories are whole lines; a thread makes four columns of
// one row. kSliding: kernels of three columns with stride and dilation 1 load and convert an input once a row of taps.
//
// Traffic of a tile: its input and halo in, its filters, its outputs out. Blocks walk tiles, and several of them share
// a multiprocessor, so that copies of some run beside the products of others.
#pragma once

#include "../common/cuda/indices.cuh"
#include "conv_epilogue.cuh"
#include "depthwise_gpu.h"

namespace effkern::conv::gpu {

template <class T, bool kSliding>
class Depthwise {
 public:
  static constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kChannels = kPixelBytes / static_cast<int>(sizeof(T));
  static constexpr int kLanesOfPixel = kPixelBytes / 16, kColumns = kDepthwiseColumns;

  __device__ explicit Depthwise(const DepthwiseProblem<T>& p)
      : p_(p), under_(input_under_tile(p.kernel, p.stride, p.dilation, p.strips)) {
    filters_ = under_.h * under_.w * kPixelBytes;
    chunk_ = device::thread() % kLanesOfPixel;
    const int lane = device::thread() / kLanesOfPixel;
    row_ = lane / p.strips, column_ = lane % p.strips * kColumns;
  }

  __device__ void tile(int32_t id) {
    const int32_t channel_groups = ceil_div(p_.channels > p_.zero_to ? p_.channels : p_.zero_to, kChannels);
    const int32_t across = ceil_div(p_.out.w, p_.strips * kColumns),
                  down = ceil_div(p_.out.h, kDepthwiseLanes / p_.strips);
    first_ = id % channel_groups * kChannels, id /= channel_groups;
    w_ = id % across * p_.strips * kColumns, id /= across;
    h_ = id % down * (kDepthwiseLanes / p_.strips), n_ = id / down;
    int32_t channels = p_.channels;
    if (p_.c_in.words) channels = device::entry_of(p_.c_in, n_, channels);
    if (p_.c_out.words) channels = device::entry_of(p_.c_out, n_, channels);
    active_ = channels - first_;
    if (active_ > 0) bring();
    device::copy_commit();
    device::copy_wait<0>();
    device::sync();
    if (h_ + row_ < p_.out.h) outputs();
    device::sync();  // the next tile's input takes the place of this one's
  }

 private:
  __device__ void bring() {
    const int32_t top = h_ * p_.stride.h - p_.pad.h, left = w_ * p_.stride.w - p_.pad.w;
    const Global<const T> x = p_.x + (n_ * p_.xs.n + first_ + chunk_ * kPer);
    const int32_t mine = active_ - chunk_ * kPer;  // active channels from the thread's chunk on
    const int32_t count = mine < 0 ? 0 : mine < kPer ? mine : kPer;
    for (int32_t i = device::thread() / kLanesOfPixel; i < under_.h * under_.w; i += kDepthwiseLanes) {
      const int32_t h = top + i / under_.w, w = left + i % under_.w;
      const bool inside = h >= 0 && h < p_.in.h && w >= 0 && w < p_.in.w;
      const Shared<char> to = device::shared_memory() + (i * kPixelBytes + chunk_ * 16);
      const Global<const T> from = x + (h * p_.xs.h + w * p_.xs.w);
      if (p_.wide_x) {
        device::copy_async16(to, from, inside ? count * static_cast<int>(sizeof(T)) : 0);
      } else {
        Vec<T, kPer> values{};
#pragma unroll
        for (int e = 0; e < kPer; ++e)
          if (inside && e < count) values.v[e] = device::load<T>(from + e);
        device::store(to, values);
      }
    }
    // Filters lie as [tap][half of a chunk][chunk][4], so that the lanes of a pixel read 16 bytes each side by side.
    const int32_t taps = p_.kernel.h * p_.kernel.w;
    for (int32_t i = device::thread(); i < taps * kChannels; i += kDepthwiseThreads) {
      const int32_t channel = i % kChannels, tap = i / kChannels;
      float value = 0.0f;
      if (channel < active_)
        value = device::to_float(
            device::load<T>(p_.weight + ((first_ + channel) * p_.weight_channel + tap / p_.kernel.w * p_.weight_h +
                                         tap % p_.kernel.w * p_.weight_w)));
      const int at = channel % kPer / 4 * (kLanesOfPixel * 4) + channel / kPer * 4 + channel % 4;
      device::store((device::shared_memory() + filters_).template as<float>() + (tap * kChannels + at), value);
    }
  }

  __device__ __forceinline__ void filter(int32_t tap, float (&to)[kPer]) const {
#pragma unroll
    for (int half = 0; half < kPer / 4; ++half) {
      const auto four = device::load<Vec<float, 4>>((device::shared_memory() + filters_).template as<float>() +
                                                    (tap * kChannels + half * (kLanesOfPixel * 4) + chunk_ * 4));
#pragma unroll
      for (int e = 0; e < 4; ++e) to[half * 4 + e] = four.v[e];
    }
  }

  __device__ __forceinline__ void input(int32_t h, int32_t w, float (&to)[kPer]) const {
    const auto chunk =
        device::load<Vec<T, kPer>>(device::shared_memory() + ((h * under_.w + w) * kPixelBytes + chunk_ * 16));
#pragma unroll
    for (int e = 0; e < kPer; ++e) to[e] = device::to_float(chunk.v[e]);
  }

  __device__ void outputs() {
    float sums[kColumns][kPer] = {};
    for (int32_t kh = 0; kh < (active_ > 0 ? p_.kernel.h : 0); ++kh) {
      const int32_t h = row_ * p_.stride.h + kh * p_.dilation.h;
      if constexpr (kSliding) {
        float in[kColumns + 2][kPer];
#pragma unroll
        for (int i = 0; i < kColumns + 2; ++i) input(h, column_ + i, in[i]);
#pragma unroll
        for (int kw = 0; kw < 3; ++kw) {
          float f[kPer];
          filter(kh * 3 + kw, f);
#pragma unroll
          for (int o = 0; o < kColumns; ++o)
#pragma unroll
            for (int e = 0; e < kPer; ++e) sums[o][e] = device::fma(in[o + kw][e], f[e], sums[o][e]);
        }
      } else {
        for (int32_t kw = 0; kw < p_.kernel.w; ++kw) {
          float f[kPer], in[kPer];
          filter(kh * p_.kernel.w + kw, f);
#pragma unroll
          for (int o = 0; o < kColumns; ++o) {
            input(h, (column_ + o) * p_.stride.w + kw * p_.dilation.w, in);
#pragma unroll
            for (int e = 0; e < kPer; ++e) sums[o][e] = device::fma(in[e], f[e], sums[o][e]);
          }
        }
      }
    }
    write(sums);
  }

  __device__ __forceinline__ void write(const float (&sums)[kColumns][kPer]) {
    const int32_t channel = first_ + chunk_ * kPer, active = active_ - chunk_ * kPer, zeros = p_.zero_to - channel;
    const int32_t stored = active > zeros ? active : zeros;
    float scale[kPer], shift[kPer];
    const int64_t at = (p_.table.words ? device::entry_of(p_.table, n_, p_.most_row) : 0) * p_.table_stride + channel;
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      scale[e] = p_.scale && e < active ? device::load<float>(p_.scale + (at + e)) : 1.0f;
      shift[e] = p_.shift && e < active ? device::load<float>(p_.shift + (at + e)) : 0.0f;
      if (p_.bias && e < active)
        shift[e] = device::fma(device::load<float>(p_.bias + (channel + e)), scale[e], shift[e]);
    }
#pragma unroll
    for (int o = 0; o < kColumns; ++o) {
      const int32_t h = h_ + row_, w = w_ + column_ + o;
      if (w >= p_.out.w) break;
      const Global<const T> residual = p_.residual + (n_ * p_.rs.n + h * p_.rs.h + w * p_.rs.w + channel);
      const Global<T> y = p_.y + (n_ * p_.ys.n + h * p_.ys.h + w * p_.ys.w + channel);
      Vec<T, kPer> out, r{};
      if (p_.residual) {
        if (p_.wide_residual && active >= kPer) {
          r = device::load<Vec<T, kPer>>(residual);
        } else {
#pragma unroll
          for (int e = 0; e < kPer; ++e)
            if (e < active) r.v[e] = device::load<T>(residual + e);
        }
      }
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const float v = device::fma(sums[o][e], scale[e], shift[e]) + device::to_float(r.v[e]);
        out.v[e] = device::from_float<T>(e < active ? activate(v, p_.act) : 0.0f);
      }
      if (p_.wide_y && stored >= kPer) {
        device::store(y, out);
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e)
          if (e < stored) device::store(y + e, out.v[e]);
      }
    }
  }

  const DepthwiseProblem<T>& p_;
  const Size2 under_;
  int32_t filters_, chunk_, row_, column_;  // where filters lie, and the thread's part of the tile
  int32_t first_ = 0, w_ = 0, h_ = 0, n_ = 0, active_ = 0;
};

template <class T, bool kSliding>
__global__ void __launch_bounds__(kDepthwiseThreads, 4)
    depthwise(const __grid_constant__ DepthwiseProblem<T> p, int32_t tiles) {
  Depthwise<T, kSliding> convolution(p);
  for (int32_t id = static_cast<int32_t>(device::block()); id < tiles; id += static_cast<int32_t>(device::blocks()))
    convolution.tile(id);
}

}  // namespace effkern::conv::gpu
