// What kernels over rows of channels share: chunks of 16 bytes and what is left of them, and sums over a block's lanes.
#pragma once

#include "columns.h"

namespace effkern::device {

// The first `count` elements of a chunk, zeros behind them. `wide`: chunks may be accessed whole.
template <class T>
__device__ __forceinline__ Vec<T, kPerChunk<T>> read_chunk(Global<const T> from, int32_t count, bool wide) {
  if (wide && count >= kPerChunk<T>) return load<Vec<T, kPerChunk<T>>>(from);
  Vec<T, kPerChunk<T>> chunk{};
#pragma unroll
  for (int e = 0; e < kPerChunk<T>; ++e)
    if (e < count) chunk.v[e] = load<T>(from + e);
  return chunk;
}

template <class T>
__device__ __forceinline__ void write_chunk(Global<T> to, const Vec<T, kPerChunk<T>>& chunk, int32_t count, bool wide) {
  if (wide && count >= kPerChunk<T>) {
    store(to, chunk);
  } else {
#pragma unroll
    for (int e = 0; e < kPerChunk<T>; ++e)
      if (e < count) store(to + e, chunk.v[e]);
  }
}

// A block's place: its slice of the rows and its channels; the thread's chunk of them and its first row.
template <class T>
struct ColumnPlace {
  int32_t slice, channel, begin, end, first, row;
  int32_t count;  // the thread's channels that are there, at most kPerChunk

  // Of piece `id` among column_groups * slices.
  __device__ ColumnPlace(const Slices& slices, int32_t channels, int32_t id) {
    const int32_t groups = column_groups<T>(channels);
    slice = id / groups, first = id % groups * kColumns<T>;
    channel = first + thread() % kColumnChunks * kPerChunk<T>;
    begin = slice * slices.slice;
    end = slices.rows - begin < slices.slice ? slices.rows : begin + slices.slice;
    row = begin + thread() / kColumnChunks;
    const int32_t left = channels - channel;
    count = left < 0 ? 0 : left < kPerChunk<T> ? left : kPerChunk<T>;
  }
};

// Stages a value for each of the thread's channels, [lane][channel].
template <class T>
__device__ __forceinline__ void stage_lanes(const float (&mine)[kPerChunk<T>], Shared<float> to) {
#pragma unroll
  for (int e = 0; e < kPerChunk<T>; e += 4)
    store(to + (thread() * kPerChunk<T> + e), Vec<float, 4>{{mine[e], mine[e + 1], mine[e + 2], mine[e + 3]}});
}

// Sums over the block's lanes, in their order: thread t < kColumns gets that of channel t. Called by all threads.
template <class T>
__device__ __forceinline__ float sum_lanes(const float (&mine)[kPerChunk<T>]) {
  const Shared<float> all = shared_memory().template as<float>();
  stage_lanes<T>(mine, all);
  sync();  // the lanes' values are there
  float sum = 0.0f;
  if (thread() < kColumns<T>) {
    for (int i = 0; i < kColumnLanes; ++i) sum += load<float>(all + (i * kColumns<T> + thread()));
  }
  sync();  // the next sum takes their place
  return sum;
}

}  // namespace effkern::device
