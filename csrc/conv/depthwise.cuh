// Depthwise convolution for sm_80 and later, bound by memory: a tile is 64 outputs of one sample times 128 bytes of
// channels. Asynchronous copies bring the input under it, halo included, into shared memory once; eight lanes hold a
// pixel's channels, 16 bytes each, so that accesses to both memories are whole lines; a thread makes four columns of
// one row. kSliding: kernels of three columns with stride and dilation 1 load and convert an input once a row of taps.
//
// Traffic of a tile: its input and halo in, its outputs out; filters where they are not those of the block's tile
// before. Blocks walk tiles, and several of them share a multiprocessor, so that copies of some run beside the products
// of others. A product takes one instruction, so addresses, conversions and the activation are made as rarely as can
// be.
#pragma once

#include "../common/cuda/indices.cuh"
#include "../common/cuda/words.cuh"
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
    first_h_ = lane / under_.w, first_w_ = lane % under_.w;
    step_h_ = kDepthwiseLanes / under_.w, step_w_ = kDepthwiseLanes % under_.w;
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
    if (active_ > 0) {
      bring();
      bring_filters();
    }
    device::copy_commit();
    bring_vectors();
    device::copy_wait<0>();
    device::sync();
    if (h_ + row_ < p_.out.h) outputs();
    device::sync();  // the next tile's input takes the place of this one's
  }

 private:
  // Pixels are walked by their rows and columns: to find those of each by division would cost more than the copy.
  __device__ void bring() {
    const int32_t top = h_ * p_.stride.h - p_.pad.h, left = w_ * p_.stride.w - p_.pad.w;
    const int32_t mine = active_ - chunk_ * kPer;  // active channels from the thread's chunk on
    const int32_t count = mine < 0 ? 0 : mine < kPer ? mine : kPer;
    const bool whole = p_.wide_x && (count == 0 || count == kPer);
    int32_t h = top + first_h_, w = left + first_w_;
    Global<const T> from = p_.x + (n_ * p_.xs.n + first_ + chunk_ * kPer + h * p_.xs.h + w * p_.xs.w);
    const int64_t step = step_h_ * p_.xs.h + step_w_ * p_.xs.w, turn = p_.xs.h - under_.w * p_.xs.w;
    Shared<char> to = device::shared_memory() + device::thread() * 16;
    for (int32_t i = device::thread() / kLanesOfPixel; i < under_.h * under_.w; i += kDepthwiseLanes) {
      const bool inside = h >= 0 && h < p_.in.h && w >= 0 && w < p_.in.w;
      if (whole)
        device::copy_async16_if(inside && count > 0, to, from);
      else if (p_.wide_x)
        device::copy_async16(to, from, inside ? count * static_cast<int>(sizeof(T)) : 0);
      else
        device::store(to, device::read_words<T>(from, inside ? count : 0, false));
      to = to + kDepthwiseLanes * kPixelBytes;
      h += step_h_, w += step_w_, from = from + step;
      if (w >= left + under_.w) ++h, w -= under_.w, from = from + turn;
    }
  }

  // Filters lie as [tap][half of a chunk][chunk][4], so that the lanes of a pixel read 16 bytes each side by side.
  __device__ void bring_filters() {
    if (first_ == filters_of_ && active_ == filters_active_) return;
    filters_of_ = first_, filters_active_ = active_;
    constexpr int kStep = kDepthwiseThreads / kChannels, kAtOnce = (9 + kStep - 1) / kStep;
    static_assert(kDepthwiseThreads % kChannels == 0);
    const int32_t width = kSliding ? 3 : p_.kernel.w, taps = p_.kernel.h * width;
    const int32_t channel = device::thread() % kChannels;
    const int at = channel % kPer / 4 * (kLanesOfPixel * 4) + channel / kPer * 4 + channel % 4;
    const Global<const T> from = p_.weight + (first_ + channel) * p_.weight_channel;
    const Shared<float> to = (device::shared_memory() + filters_).template as<float>() + at;
    for (int32_t start = device::thread() / kChannels; start < taps; start += kAtOnce * kStep) {
      float values[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (const int32_t tap = start + i * kStep; tap < taps && channel < active_)
          values[i] = device::to_float(device::load<T>(from + (tap / width * p_.weight_h + tap % width * p_.weight_w)));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (const int32_t tap = start + i * kStep; tap < taps) device::store(to + tap * kChannels, values[i]);
    }
  }

  // Factors of the thread's channels, asked for before the wait for the input.
  __device__ __forceinline__ void bring_vectors() {
    const int32_t channel = first_ + chunk_ * kPer, active = active_ - chunk_ * kPer;
    const int64_t at = (p_.table.words ? device::entry_of(p_.table, n_, p_.most_row) : 0) * p_.table_stride + channel;
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      scale_[e] = p_.scale && e < active ? device::load<float>(p_.scale + (at + e)) : 1.0f;
      shift_[e] = p_.shift && e < active ? device::load<float>(p_.shift + (at + e)) : 0.0f;
    }
    if (!p_.bias) return;
#pragma unroll
    for (int e = 0; e < kPer; ++e)
      if (e < active) shift_[e] = device::fma(device::load<float>(p_.bias + (channel + e)), scale_[e], shift_[e]);
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
    device::widen<T>(
        device::load<device::Words>(device::shared_memory() + ((h * under_.w + w) * kPixelBytes + chunk_ * 16)), to);
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

  __device__ __forceinline__ void write(float (&sums)[kColumns][kPer]) {
    const int32_t channel = first_ + chunk_ * kPer, active = active_ - chunk_ * kPer, zeros = p_.zero_to - channel;
    const int32_t stored = active > zeros ? active : zeros;
    const int32_t h = h_ + row_, w = w_ + column_, columns = p_.out.w - w;
    const Global<const T> residual = p_.residual + (n_ * p_.rs.n + h * p_.rs.h + w * p_.rs.w + channel);
    const Global<T> y = p_.y + (n_ * p_.ys.n + h * p_.ys.h + w * p_.ys.w + channel);
    device::Words r[kColumns] = {};
    if (p_.residual) {
#pragma unroll
      for (int o = 0; o < kColumns; ++o)
        if (o < columns) r[o] = device::read_words<T>(residual + o * p_.rs.w, active, p_.wide_residual);
    }
#pragma unroll
    for (int o = 0; o < kColumns; ++o) {
      float add[kPer];
      device::widen<T>(r[o], add);
#pragma unroll
      for (int e = 0; e < kPer; ++e) sums[o][e] = device::fma(sums[o][e], scale_[e], shift_[e]) + add[e];
    }
    activate_all(sums, p_.act);
    if (active < kPer) {
#pragma unroll
      for (int o = 0; o < kColumns; ++o)
#pragma unroll
        for (int e = 0; e < kPer; ++e) sums[o][e] = e < active ? sums[o][e] : 0.0f;
    }
#pragma unroll
    for (int o = 0; o < kColumns; ++o) {
      if (o >= columns) break;
      device::write_words<T>(y + o * p_.ys.w, device::narrow<T>(sums[o]), stored, p_.wide_y);
    }
  }

  // One branch for all, not one for each.
  __device__ __forceinline__ static void activate_all(float (&sums)[kColumns][kPer], Act act) {
    const auto each = [&](Act one) {
#pragma unroll
      for (int o = 0; o < kColumns; ++o)
#pragma unroll
        for (int e = 0; e < kPer; ++e) sums[o][e] = activate(sums[o][e], one);
    };
    switch (act) {
      case Act::Relu:
        return each(Act::Relu);
      case Act::Relu6:
        return each(Act::Relu6);
      case Act::Hardswish:
        return each(Act::Hardswish);
      case Act::Silu:
        return each(Act::Silu);
      default:
        return;
    }
  }

  const DepthwiseProblem<T>& p_;
  const Size2 under_;
  int32_t filters_, chunk_, row_, column_;        // where filters lie, and the thread's part of the tile
  int32_t first_h_, first_w_, step_h_, step_w_;   // the thread's first pixel under a tile, and the way to the next one
  int32_t filters_of_ = -1, filters_active_ = 0;  // the channels whose filters are there
  float scale_[kPer], shift_[kPer];
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
