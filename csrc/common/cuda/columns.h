// Maps as rows of channels, one a pixel, and how blocks share out their rows: for kernels that sum over all pixels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.cuh"

namespace effkern::device {

// A block takes eight chunks of 16 bytes of channels, of 16 rows at a time.
constexpr int kColumnThreads = 128, kColumnChunks = 8, kColumnLanes = kColumnThreads / kColumnChunks;
template <class T>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kColumns = kColumnChunks * kPerChunk<T>;  // channels of a block
constexpr int kColumnShared = kColumnThreads * 8 * 4;   // a float for each of a thread's channels

template <class T>
EFFKERN_BOTH int32_t column_groups(int32_t channels) {
  return (channels + kColumns<T> - 1) / kColumns<T>;
}

template <class T>
struct Rows {
  Global<T> at;
  int64_t pitch;  // elements from row to row; channels are side by side
};

// Rows are cut into slices that are summed one by one and then added up in order. The cut follows the shape alone, so
// that a sum is the same bits on every device.
struct Slices {
  int32_t rows, slice, count;  // all rows, those of a slice, slices
};

// `rows` in as many slices as there are of `most`, each of whole `step`s; the last ones may be empty.
EFFKERN_BOTH Slices slices_within(const Slices& most, int32_t rows, int32_t step) {
  const int32_t each = rows > 0 ? (rows - 1) / most.count + 1 : 1;
  return {rows, (each - 1) / step * step + step, most.count};
}

// At least `least` rows a slice, as many slices as `wanted` of them, a slice of whole `step`s.
inline Slices slices_of(int64_t rows, int64_t wanted, int64_t least, int64_t step) {
  const int64_t count = std::max<int64_t>(1, std::min(wanted, rows / least));
  const int64_t slice = std::max<int64_t>(1, ((rows + count - 1) / count + step - 1) / step) * step;
  return {static_cast<int32_t>(rows), static_cast<int32_t>(slice), static_cast<int32_t>((rows + slice - 1) / slice)};
}

// A map of each sample in pieces of whole steps of a block of kColumnThreads, at least 64 pixels each, so many that a
// large device is full. rows and slice are of one map.
template <class T>
Slices pieces_of(int64_t samples, int64_t pixels, int32_t channels) {
  const int64_t blocks = std::max<int64_t>(1, int64_t{column_groups<T>(channels)} * samples);
  return slices_of(pixels, (528 + blocks - 1) / blocks, 4 * kColumnLanes, kColumnLanes);
}

// Maps of the same size, one a sample, for kernels whose blocks of kColumnThreads take kColumns channels of a piece of
// one map.
struct Pieces {
  int32_t samples, pixels, channels;  // of a map
  int32_t pieces, piece;              // that a map is cut into, pixels of one

  template <class T>
  void cut() {
    const Slices s = pieces_of<T>(samples, pixels, channels);
    pieces = s.count, piece = s.slice;
  }
  template <class T>
  int64_t blocks() const {
    return int64_t{column_groups<T>(channels)} * pieces * samples;
  }
};

// For blocks of kColumnThreads: enough slices that a device of 132 multiprocessors has four blocks each.
template <class T>
Slices column_slices(int64_t rows, int64_t channels) {
  const int64_t groups = std::max<int64_t>(1, (channels + kColumns<T> - 1) / kColumns<T>);
  return slices_of(rows, (528 + groups - 1) / groups, 4 * kColumnLanes, kColumnLanes);
}

}  // namespace effkern::device
