// Chunks of 16 bytes of numbers as the four words they are moved in. Where a chunk stays words until its numbers are
// wanted, the compiler need not wait for a load to take it apart.
#pragma once

#include <cstring>

#include "device.cuh"

namespace effkern::device {

using Words = Vec<uint32_t, 4>;

template <class T>
__device__ __forceinline__ void widen(const Words& words, float (&to)[16 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    memcpy(to, words.v, sizeof(to));
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const Vec<float, 2> two = unpack<T>(words.v[w]);
      to[2 * w] = two.v[0], to[2 * w + 1] = two.v[1];
    }
  }
}

template <class T>
__device__ __forceinline__ Words narrow(const float (&from)[16 / sizeof(T)]) {
  Words words;
  if constexpr (sizeof(T) == 4) {
    memcpy(words.v, from, sizeof(from));
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) words.v[w] = pack<T>(from[2 * w], from[2 * w + 1]);
  }
  return words;
}

// The first `count` numbers of a chunk, zeros behind them. `wide`: chunks may be accessed whole.
template <class T>
__device__ __forceinline__ Words read_words(Global<const T> from, int32_t count, bool wide) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  if (wide && count >= kPer) return load<Words>(from);
  Vec<T, kPer> chunk{};
#pragma unroll
  for (int e = 0; e < kPer; ++e)
    if (e < count) chunk.v[e] = load<T>(from + e);
  Words words;
  memcpy(words.v, chunk.v, sizeof(chunk));
  return words;
}

template <class T>
__device__ __forceinline__ void write_words(Global<T> to, const Words& words, int32_t count, bool wide) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  if (wide && count >= kPer) {
    store(to, words);
  } else {
    Vec<T, kPer> chunk;
    memcpy(chunk.v, words.v, sizeof(chunk));
#pragma unroll
    for (int e = 0; e < kPer; ++e)
      if (e < count) store(to + e, chunk.v[e]);
  }
}

}  // namespace effkern::device
