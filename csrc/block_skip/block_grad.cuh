// From the gradient at a skipped block's output to those at its sum and its shortcut, in one pass. A block takes 128
// bytes of channels of a piece of one sample, so that the mask is the same for all of its threads.
//
// Traffic: gy once; of kept samples z once; what is written once; a float a channel and piece.
#pragma once

#include "../common/cuda/pieces.cuh"
#include "../conv/conv_epilogue.cuh"
#include "../conv_backward/slope.cuh"
#include "block_grad.h"

namespace effkern::block_skip {

template <class T>
__global__ void __launch_bounds__(device::kColumnThreads, 5) block_grad(const __grid_constant__ BlockGrad<T> p) {
  constexpr int kPer = device::kPerChunk<T>;
  const device::PiecePlace<T> place(p);
  const int32_t channel = place.in.channel, count = place.in.count;
  const float mask = p.keep ? device::load<float>(p.keep + place.sample * p.keep_step) : 1.0f;
  const bool kept = mask != 0.0f;
  const float gate = p.soft || !kept ? mask : 1.0f;
  float sums[kPer] = {}, dots[kPer] = {};
  if (count > 0 && (kept || p.rest.at || p.dots)) {
    for (int32_t pixel = place.in.row; pixel < place.in.end; pixel += device::kColumnLanes) {
      const int64_t at = place.row + pixel;
      const auto g = device::read_chunk<T>(p.gy.at + (at * p.gy.pitch + channel), count, p.wide);
      device::Vec<T, kPer> z{}, old{}, gz{}, rest = g;
      if (p.z.at && (kept || p.dots)) z = device::read_chunk<T>(p.z.at + (at * p.z.pitch + channel), count, p.wide);
      if (p.dots) old = device::read_chunk<T>(p.old.at + (at * p.old.pitch + channel), count, p.wide);
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const float in = device::to_float(g.v[e]), seen = device::to_float(z.v[e]);
        if (p.dots) {
          const float adds = conv::gpu::activate(seen, p.act) - device::to_float(old.v[e]);
          dots[e] = device::fma(in, adds, dots[e]);
        }
        if (!kept) continue;
        const float sum = conv::gpu::through(gate * in, seen, p.act);
        sums[e] += sum;
        gz.v[e] = device::from_float<T>(sum);
        rest.v[e] = gate == 1.0f ? gz.v[e] : device::from_float<T>(device::fma(1.0f - gate, in, sum));
      }
      if (p.gz.at && kept) device::write_chunk<T>(p.gz.at + (at * p.gz.pitch + channel), gz, count, p.wide);
      if (p.rest.at) device::write_chunk<T>(p.rest.at + (at * p.rest.pitch + channel), rest, count, p.wide);
    }
  }
  if (p.sums) place.store_sums(sums, p, p.sums);
  if (p.dots) {
    const float dot = device::sum_lanes<T>(dots);
    const device::Shared<float> all = device::shared_memory().template as<float>();
    if (device::thread() < device::kColumns<T>) device::store(all + device::thread(), dot);
    device::sync();  // the channels' dots are there
    if (device::thread() == 0) {
      float sum = 0.0f;
      for (int i = 0; i < device::kColumns<T>; ++i) sum += device::load<float>(all + i);
      const int32_t group = place.piece * place.groups + place.group;
      device::store(p.dots + (static_cast<int64_t>(group) * p.samples + place.sample), sum);
    }
  }
}

}  // namespace effkern::block_skip
