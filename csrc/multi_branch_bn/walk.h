// How a tensor is cut up: segments are the units of work and of the sums, tiles fit the L1 cache. Both depend on the
// shape alone, so the order of every sum does too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace effkern::multi_branch_bn {

// A tile: `pixels` positions from q on of channels [c, c + channels). A position counts (sample, row, column). Where
// tensors are planar a tile is part of one plane or a number of whole ones.
struct Spot {
  int64_t q, pixels, c, channels;
};

struct Walk {
  static constexpr int64_t kTileFloats = 4096;        // 16 KiB a tensor
  static constexpr int64_t kSegmentFloats = 1 << 16;  // 256 KiB a tensor

  bool interleaved;
  int64_t plane, positions, channels;
  int64_t tile, block;        // positions and channels of a full tile
  int64_t segment, segments;  // positions of a segment; their number, at least 1

  explicit Walk(const Branches& b)
      : interleaved(b.interleaved),
        plane(b.x[0].h * b.x[0].w),
        positions(b.x[0].n * plane),
        channels(b.x[0].c),
        block(1) {
    if (interleaved) {
      // Blocks of equal length, rounded up to whole cache lines.
      const int64_t blocks = std::max<int64_t>((channels + kBlock - 1) / kBlock, 1);
      const int64_t equal = ((channels + blocks - 1) / blocks + 15) / 16 * 16;
      block = std::max<int64_t>(std::min(channels, equal), 1);
      tile = std::clamp<int64_t>(2 * kTileFloats / block / 4 * 4, 32, 256);
      segment = std::max<int64_t>(4, kSegmentFloats / (tile * std::max<int64_t>(channels, 1))) * tile;
    } else {
      tile = plane > 0 && plane <= kTileFloats ? kTileFloats / plane * plane : kTileFloats;
      segment = kSegmentFloats / 2 / tile * tile;
    }
    segments = std::max<int64_t>((positions + segment - 1) / segment, 1);
  }

  // Groups of channels that are worked on apart: all of them where interleaved, else each.
  int64_t groups() const { return interleaved ? 1 : channels; }

  // Calls body(Spot) for the tiles of a segment in order.
  template <class Body>
  void tiles(int64_t seg, int64_t group, Body body) const {
    const int64_t end = std::min(positions, (seg + 1) * segment);
    for (int64_t q = seg * segment; q < end;) {
      int64_t pixels = std::min(tile, end - q);
      if (!interleaved) {
        if (plane > tile) pixels = std::min(pixels, plane - q % plane);
        body(Spot{q, pixels, group, 1});
      } else {
        for (int64_t c = 0; c < channels; c += block) body(Spot{q, pixels, c, std::min(block, channels - c)});
      }
      q += pixels;
    }
  }
};

}  // namespace effkern::multi_branch_bn
