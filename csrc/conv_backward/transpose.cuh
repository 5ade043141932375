// The running part of a weight for the gradient in the input: outputs and inputs exchanged, taps turned round and, for
// strides, sorted by the input positions they meet. Tiles of 32 x 32 through shared memory, so that reads follow the
// inputs and writes the outputs.
#pragma once

#include "backward_gpu.h"

namespace effkern::conv::gpu {

using device::Shared;

constexpr int kTransposeThreads = 256, kTransposeTile = 32, kTransposePitch = kTransposeTile + 1;
constexpr int kTransposeShared = kTransposeTile * kTransposePitch * 4;

template <class T>
EFFKERN_BOTH int64_t transpose_tiles(const Transpose<T>& p) {
  constexpr int32_t k = kTransposeTile;
  return int64_t{(p.c_out + k - 1) / k} * ((p.c_in + k - 1) / k) * p.groups * p.kernel.h * p.kernel.w;
}

template <class T>
__global__ void __launch_bounds__(kTransposeThreads, 4) transpose(const __grid_constant__ Transpose<T> p) {
  const Shared<float> tile = device::shared_memory().template as<float>();
  const int column = device::thread() % kTransposeTile, first = device::thread() / kTransposeTile;
  constexpr int kRows = kTransposeThreads / kTransposeTile;
  const int32_t outputs = (p.c_out + kTransposeTile - 1) / kTransposeTile,
                inputs = (p.c_in + kTransposeTile - 1) / kTransposeTile, taps = p.kernel.h * p.kernel.w;
  const int64_t tiles = transpose_tiles(p);
  for (int64_t id = device::block(); id < tiles; id += device::blocks()) {
    const int32_t output = static_cast<int32_t>(id % outputs) * kTransposeTile,
                  input = static_cast<int32_t>(id / outputs % inputs) * kTransposeTile;
    const int64_t rest = id / outputs / inputs;
    const int32_t tap = static_cast<int32_t>(rest % taps), group = static_cast<int32_t>(rest / taps);
    const Size2 at{tap / p.kernel.w, tap % p.kernel.w};
    const Global<const T> from =
        p.weight + (static_cast<int64_t>(group) * p.group_rows * p.so + at.h * p.sh + at.w * p.sw);
    for (int row = first; row < kTransposeTile; row += kRows) {
      if (output + row < p.c_out && input + column < p.c_in)
        device::store(tile + (row * kTransposePitch + column),
                      device::to_float(device::load<T>(from + ((output + row) * p.so + (input + column) * p.si))));
    }
    device::sync();  // the tile is there
    const int64_t place = tap_place(p.kernel, p.step, at);
    for (int row = first; row < kTransposeTile; row += kRows) {
      if (input + row < p.c_in && output + column < p.c_out) {
        const int64_t to = ((static_cast<int64_t>(group) * p.c_in + input + row) * taps + place) * p.pitch;
        device::store(p.to + (to + output + column),
                      device::from_float<T>(device::load<float>(tile + (column * kTransposePitch + row))));
      }
    }
    device::sync();  // the next tile takes its place
  }
}

}  // namespace effkern::conv::gpu
