// y = act(sum * scale + shift + residual), one store an element. A warp takes its tile through shared memory in strips
// of 16 rows, so that what a lane stores is 16 bytes of one pixel's channels.
#pragma once

#include "conv_math.cuh"

namespace effkern::conv::gpu {

// Comparisons with NaN are false, so NaN passes all of them, as in torch.
__device__ __forceinline__ float activate(float v, Act act) {
  switch (act) {
    case Act::Relu:
      return v < 0.0f ? 0.0f : v;
    case Act::Relu6:
      return v < 0.0f ? 0.0f : v > 6.0f ? 6.0f : v;
    case Act::Hardswish: {
      const float gate = v + 3.0f;
      return v * (gate < 0.0f ? 0.0f : gate > 6.0f ? 6.0f : gate) / 6.0f;
    }
    case Act::Silu:
      return v / (1.0f + device::exp(-v));
    default:
      return v;
  }
}

// What the lanes need to know of a row of the tile, in shared memory: it takes divisions to find out.
struct alignas(16) RowPlace {
  int64_t y, residual;  // offset of the row's first channel; y < 0: past the end
};

template <class C>
class Epilogue {
 public:
  using T = typename C::T;
  using Sums = typename C::Sums;
  static constexpr int kPer = 16 / static_cast<int>(sizeof(T));  // channels a lane stores at once
  static constexpr int kLanes = C::kWarpN / kPer;                // lanes a row
  static constexpr int kRows = 32 / kLanes;                      // rows at once
  static_assert(kLanes * kPer == C::kWarpN && kStrip % kRows == 0);
  static constexpr int kStripBytes = kStrip * Sums::kPitch * 4;
  static constexpr int kPlaces = C::kWarps * kStripBytes, kTables = kPlaces + C::kTileM * 16;
  static constexpr int kGates = kTables + C::kTileM * 4, kBytes = kGates + C::kTileM * 4;

  // Fills the table of rows. Between a barrier that ends the use of the stages and one that shows the table.
  __device__ static void place_rows(const Problem<T>& p, const Tile& tile) {
    const int row = device::thread();
    if (row >= C::kTileM) return;
    const int32_t pixels = p.out.h * p.out.w, m = tile.m + row;
    Vec<int64_t, 2> place{{-1, 0}};
    int32_t table = 0;
    float gate = 1.0f;
    if (m < tile.rows) {
      const int32_t pixel = m % pixels, entry = tile.part.first + m / pixels;
      const int32_t h = pixel / p.out.w, w = pixel % p.out.w;
      const int64_t sample = sample_of<T>(p.y_rows, entry);
      place.v[0] = sample * p.ys.n + h * p.ys.h + w * p.ys.w;
      if (p.residual) place.v[1] = sample_of<T>(p.residual_rows, entry) * p.rs.n + h * p.rs.h + w * p.rs.w;
      if (p.table_row) table = device::load<int32_t>(p.table_row + sample_of<T>(p.x_rows, entry));
      if (p.gate) gate = device::load<float>(p.gate + sample);
    }
    device::store((device::shared_memory() + kPlaces).template as<Vec<int64_t, 2>>() + row, place);
    device::store((device::shared_memory() + kTables).template as<int32_t>() + row, table);
    device::store((device::shared_memory() + kGates).template as<float>() + row, gate);
  }

  __device__ Epilogue(const Problem<T>& p, const Tile& tile, int warp, int warp_m, int warp_n)
      : p_(p), warp_m_(warp_m), strip_(warp * kStripBytes) {
    row_ = device::lane() / kLanes;
    column_ = device::lane() % kLanes * kPer;
    const int32_t n = tile.n + warp_n + column_;  // in the group
    channel_ = tile.group * tile.part.c_out + n;
    active_ = tile.part.c_out - n;
    zeros_ = p.zero_to - n;
    bias_ = tile.group * p.group_rows + n;
    load_table(0);
  }

  // Sums are registers, so a strip of them is chosen by comparison and not by an index. A strip's rows of the residual
  // are on their way while its sums go through shared memory.
  __device__ __forceinline__ void run(const Sums& sums) {
#pragma unroll 1
    for (int strip = 0; strip < C::kWarpM / kStrip; ++strip) {
      Row rows[kStrip / kRows];
#pragma unroll
      for (int i = 0; i < kStrip / kRows; ++i) rows[i] = begin_row(warp_m_ + strip * kStrip + i * kRows + row_);
#pragma unroll
      for (int s = 0; s < C::kWarpM / kStrip; ++s)
        if (s == strip) sums.stage(s, (device::shared_memory() + strip_).template as<float>());
      device::sync_warp();
#pragma unroll
      for (int i = 0; i < kStrip / kRows; ++i) store_row(rows[i], strip * kStrip, i * kRows + row_);
      device::sync_warp();
    }
  }

 private:
  struct Row {
    int64_t y;  // offset of its first channel; negative: nothing to store
    Vec<T, kPer> residual;
  };

  __device__ __forceinline__ Row begin_row(int in_tile) {
    const auto place =
        device::load<Vec<int64_t, 2>>((device::shared_memory() + kPlaces).template as<Vec<int64_t, 2>>() + in_tile);
    Row row{active_ > 0 || zeros_ > 0 ? place.v[0] : -1, {}};
    if (row.y < 0 || !p_.residual) return row;
    const Global<const T> residual = p_.residual + (place.v[1] + channel_);
    if (active_ >= kPer && p_.wide_residual) {
      row.residual = device::load<Vec<T, kPer>>(residual);
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e)
        if (e < active_) row.residual.v[e] = device::load<T>(residual + e);
    }
    return row;
  }

  __device__ __forceinline__ void store_row(const Row& place, int first, int row) {
    if (place.y < 0) return;
    Vec<float, kPer> v;
    const Shared<float> from = (device::shared_memory() + strip_).template as<float>() + (row * Sums::kPitch + column_);
    // Half of the lanes read their halves in opposite order: eight lanes then touch every bank once.
    const int swap = kPer == 8 ? device::lane() >> (kLanes == 2 ? 0 : 2) & 1 : 0;
    Vec<float, 4> part[kPer / 4];
#pragma unroll
    for (int i = 0; i < kPer / 4; ++i) part[i] = device::load<Vec<float, 4>>(from + (i ^ swap) * 4);
#pragma unroll
    for (int e = 0; e < kPer; ++e) v.v[e] = swap != 0 ? part[(e / 4 + 1) % (kPer / 4)].v[e % 4] : part[e / 4].v[e % 4];

    const int in_tile = warp_m_ + first + row;
    if (p_.table_row)
      load_table(device::load<int32_t>((device::shared_memory() + kTables).template as<int32_t>() + in_tile));
    const Global<T> y = p_.y + (place.y + channel_);
#pragma unroll
    for (int e = 0; e < kPer; ++e) v.v[e] = device::fma(v.v[e], scale_[e], shift_[e]);
    if (p_.residual) {
#pragma unroll
      for (int e = 0; e < kPer; ++e) v.v[e] += device::to_float(place.residual.v[e]);
    }
#pragma unroll
    for (int e = 0; e < kPer; ++e) v.v[e] = e < active_ ? activate(v.v[e], p_.act) : 0.0f;
    if (p_.gate) {
      const float gate = device::load<float>((device::shared_memory() + kGates).template as<float>() + in_tile);
#pragma unroll
      for (int e = 0; e < kPer; ++e)  // exactly the new value at 1: the residual may be infinite
        if (gate != 1.0f) v.v[e] = device::fma(gate, v.v[e], (1.0f - gate) * device::to_float(place.residual.v[e]));
    }
    Vec<T, kPer> out;
#pragma unroll
    for (int e = 0; e < kPer; ++e) out.v[e] = device::from_float<T>(v.v[e]);
    if (p_.wide_y && (active_ > zeros_ ? active_ : zeros_) >= kPer) {
      device::store(y, out);
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e)
        if (e < active_ || e < zeros_) device::store(y + e, out.v[e]);
    }
  }

  __device__ void load_table(int32_t row) {
    const int64_t at = row * p_.table_stride + channel_;
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      scale_[e] = p_.scale && e < active_ ? device::load<float>(p_.scale + (at + e)) : 1.0f;
      shift_[e] = p_.shift && e < active_ ? device::load<float>(p_.shift + (at + e)) : 0.0f;
      if (p_.bias && e < active_)
        shift_[e] = device::fma(device::load<float>(p_.bias + (bias_ + e)), scale_[e], shift_[e]);
    }
  }

  const Problem<T>& p_;
  const int warp_m_, strip_;
  int32_t row_, column_, channel_, bias_, active_, zeros_;
  float scale_[kPer], shift_[kPer];
};

}  // namespace effkern::conv::gpu
