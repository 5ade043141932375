// Where a block is among pieces of samples' maps, and where its sums go.
#pragma once

#include "columns.cuh"

namespace effkern::device {

template <class T>
struct PiecePlace {
  int32_t groups, sample, piece, group;
  ColumnPlace<T> in;  // the sample's map, whose slices are the pieces
  int64_t row;        // the sample's first pixel

  __device__ explicit PiecePlace(const Pieces& p)
      : groups(column_groups<T>(p.channels)),
        sample(static_cast<int32_t>(block()) / groups / p.pieces),
        piece(static_cast<int32_t>(block()) / groups % p.pieces),
        group(static_cast<int32_t>(block()) % groups),
        in({p.pixels, p.piece, p.pieces}, p.channels, piece * groups + group),
        row(static_cast<int64_t>(sample) * p.pixels) {}

  // sum_lanes() of what each thread has, to [samples * pieces][channels]. Called by all threads.
  __device__ void store_sums(const float (&mine)[kPerChunk<T>], const Pieces& p, Global<float> to) const {
    const float sum = sum_lanes<T>(mine);
    const int32_t channel = in.first + thread();
    if (thread() < kColumns<T> && channel < p.channels)
      store(to + ((static_cast<int64_t>(sample) * p.pieces + piece) * p.channels + channel), sum);
  }
};

}  // namespace effkern::device
