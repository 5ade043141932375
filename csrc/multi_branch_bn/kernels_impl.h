// The inner loops, written once over the number of lanes. Included by kernels_<isa>.cpp inside that set's namespace and
// after its target pragma; includes nothing itself, so that no library code is compiled for the set. That file has
// defined F16, the conversion of kF16Lanes half-precision numbers at a time, and Streaming, stores of kStreamLanes
// numbers past the caches.
// (No include guard: each file includes it once, in its own namespace.)

template <int kLanes>
struct Simd : Lanes<kLanes> {
  using typename Lanes<kLanes>::Vec;
  using Lanes<kLanes>::load, Lanes<kLanes>::save;
  // The same, and the line `ahead` of it into the L2 cache: the loops go through a tile column by column, which the
  // processor's own prefetchers do not follow.
  static Vec load(const float* p, int64_t ahead) {
    __builtin_prefetch(p + ahead, 0, 2);
    return load(p);
  }
  static Vec fill(float value) { return Vec{} + value; }
  // The last `count` of `all` numbers, count < kLanes, in the upper lanes; the others are `rest`.
  static Vec load_last(const float* p, int64_t all, int64_t count, Vec rest) {
    float lane[kLanes];
    if (all >= kLanes) {
      for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
      return load(lane) >= static_cast<float>(kLanes - count) ? load(p + all - kLanes) : rest;
    }
    save(lane, rest);
    for (int64_t i = 0; i < count; ++i) lane[kLanes - count + i] = p[all - count + i];
    return load(lane);
  }
  static float sum(Vec v) {
    float lane[kLanes];
    save(lane, v);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
};

// One vector of coefficients a branch, and what is computed from them.
template <int kLanes, int kB>
struct Line {
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  Vec mean[kB], scale[kB], shift, floor;

  // `load` gives the entries of a vector over the channels that belong to the lanes.
  template <class Load>
  Line(const Tile& t, Load load) : shift(load(t.shift)), floor(S::fill(t.floor)) {
#pragma GCC unroll 4
    for (int i = 0; i < kB; ++i) mean[i] = load(t.mean[i]), scale[i] = load(t.scale[i]);
  }
  // Of an interleaved pixel from the means, from channel c on.
  void deviations(const Tile& t, int64_t pixel, int64_t c, Vec* d) const {
#pragma GCC unroll 4
    for (int i = 0; i < kB; ++i) d[i] = S::load(t.x[i] + pixel * t.x_pitch[i] + c, t.x_ahead[i]) - mean[i];
  }
  Vec z(const Vec* deviation) const {
    Vec sum = shift;
#pragma GCC unroll 4
    for (int i = 0; i < kB; ++i) sum += scale[i] * deviation[i];
    return sum;
  }
  // Comparisons are ordered so that NaN passes through, forward and backward, as in torch.
  Vec cut(Vec z) const { return z < floor ? floor : z; }
  Vec grad(Vec z, Vec grad_y) const { return z <= floor ? Vec{} : grad_y; }
};

// Planar: the lanes are pixels of one channel.

template <int kLanes>
void planar_moments(const Tile& t, const float* center) {
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  const Vec c = S::fill(*center);
  Vec first[4] = {}, second[4] = {};
  for (int64_t r = 0; r < t.planes; ++r) {
    const float* x = t.x[0] + r * t.x_pitch[0];
    int64_t p = 0;
    for (; p + 4 * kLanes <= t.pixels; p += 4 * kLanes) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec d = S::load(x + p + v * kLanes, t.x_ahead[0]) - c;
        first[v] += d;
        second[v] += d * d;
      }
    }
    for (; p < t.pixels; p += kLanes) {
      const Vec d =
          (p + kLanes <= t.pixels ? S::load(x + p, t.x_ahead[0]) : S::load_last(x, t.pixels, t.pixels - p, c)) - c;
      first[0] += d;
      second[0] += d * d;
    }
  }
  t.sums[0] = S::sum((first[0] + first[1]) + (first[2] + first[3]));
  t.sums[1] = S::sum((second[0] + second[1]) + (second[2] + second[3]));
}

// Calls step(p) for vectors that cover all pixels. The last one may overlap the one before it, which writes the same
// again; runs shorter than a vector take narrower ones.
template <int kLanes, class Step>
void cover(int64_t count, Step step) {
  int64_t p = 0;
  for (; p + kLanes <= count; p += kLanes) step(p);
  if (p < count) step(count - kLanes);
}

template <int kLanes, int kB>
void planar_apply(const Tile& t) {
  if constexpr (kLanes > 1) {
    if (t.pixels < kLanes) return planar_apply<kLanes / 2, kB>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  const Line<kLanes, kB> line(t, [](const float* v) { return S::fill(*v); });
  for (int64_t r = 0; r < t.planes; ++r) {
    cover<kLanes>(t.pixels, [&](int64_t p) {
      Vec d[kB];
#pragma GCC unroll 4
      for (int i = 0; i < kB; ++i) d[i] = S::load(t.x[i] + r * t.x_pitch[i] + p, t.x_ahead[i]) - line.mean[i];
      S::save(t.out[0] + r * t.out_pitch + p, line.cut(line.z(d)));
    });
  }
}

template <int kLanes, int kB>
void planar_grad_sums(const Tile& t) {
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  const Line<kLanes, kB> line(t, [](const float* v) { return S::fill(*v); });
  Vec sum[1 + kB] = {};
  const auto add = [&](Vec grad_y, const Vec* x) {
    Vec d[kB];
#pragma GCC unroll 4
    for (int i = 0; i < kB; ++i) d[i] = x[i] - line.mean[i];
    const Vec g = line.grad(line.z(d), grad_y);
    sum[0] += g;
#pragma GCC unroll 4
    for (int i = 0; i < kB; ++i) sum[1 + i] += g * d[i];
  };
  Vec x[kB];
  for (int64_t r = 0; r < t.planes; ++r) {
    const float* grad = t.grad + r * t.grad_pitch;
    int64_t p = 0;
    for (; p + kLanes <= t.pixels; p += kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kB; ++i) x[i] = S::load(t.x[i] + r * t.x_pitch[i] + p, t.x_ahead[i]);
      add(S::load(grad + p, t.grad_ahead), x);
    }
    if (p < t.pixels) {
      const int64_t rest = t.pixels - p;
#pragma GCC unroll 4
      for (int i = 0; i < kB; ++i) x[i] = S::load_last(t.x[i] + r * t.x_pitch[i], t.pixels, rest, line.mean[i]);
      add(S::load_last(grad, t.pixels, rest, Vec{}), x);
    }
  }
  for (int i = 0; i <= kB; ++i) t.sums[i] = S::sum(sum[i]);
}

template <int kLanes, int kB, bool kBatch>
void planar_grad(const Tile& t) {
  if constexpr (kLanes > 1) {
    if (t.pixels < kLanes) return planar_grad<kLanes / 2, kB, kBatch>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  const Line<kLanes, kB> line(t, [](const float* v) { return S::fill(*v); });
  Vec slope[kB], offset[kB];
  for (int i = 0; i < kB && kBatch; ++i) slope[i] = S::fill(*t.slope[i]), offset[i] = S::fill(*t.offset[i]);
  for (int64_t r = 0; r < t.planes; ++r) {
    cover<kLanes>(t.pixels, [&](int64_t p) {
      Vec d[kB];
#pragma GCC unroll 4
      for (int i = 0; i < kB; ++i) d[i] = S::load(t.x[i] + r * t.x_pitch[i] + p, t.x_ahead[i]) - line.mean[i];
      const Vec g = line.grad(line.z(d), S::load(t.grad + r * t.grad_pitch + p, t.grad_ahead));
#pragma GCC unroll 4
      for (int i = 0; i < kB; ++i) {
        if (t.out[i] == nullptr) continue;
        Vec dx = line.scale[i] * g;
        if constexpr (kBatch) dx = line.scale[i] * g + (slope[i] * d[i] + offset[i]);
        S::save(t.out[i] + r * t.out_pitch + p, dx);
      }
    });
  }
}

// Interleaved: the lanes are channels of one pixel. The last vector of channels may overlap the one before it.

template <int kLanes>
void interleaved_moments(const Tile& t, const float* center) {
  if constexpr (kLanes > 1) {
    if (t.channels < kLanes) return interleaved_moments<kLanes / 2>(t, center);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  constexpr int kVecs = 4;
  const auto columns = [&]<int kN>(int64_t c) {
    Vec middle[kN], first[kN] = {}, second[kN] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kN; ++v) middle[v] = S::load(center + c + v * kLanes);
    const float* row = t.x[0] + c;
    for (int64_t p = 0; p < t.pixels; ++p, row += t.x_pitch[0]) {
#pragma GCC unroll 4
      for (int v = 0; v < kN; ++v) {
        const Vec d = S::load(row + v * kLanes, t.x_ahead[0]) - middle[v];
        first[v] += d;
        second[v] += d * d;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kN; ++v) {
      S::save(t.sums + c + v * kLanes, first[v]);
      S::save(t.sums + t.channels + c + v * kLanes, second[v]);
    }
  };
  int64_t c = 0;
  for (; c + kVecs * kLanes <= t.channels; c += kVecs * kLanes) columns.template operator()<kVecs>(c);
  for (; c + kLanes <= t.channels; c += kLanes) columns.template operator()<1>(c);
  if (c < t.channels) columns.template operator()<1>(t.channels - kLanes);
}

constexpr int kRows = 4;  // pixels that share one load of the coefficients

// Calls rows.template run<n>(p) for pixels p, p + 1, .. p + n - 1 until all are done.
template <class Rows>
void by_rows(int64_t pixels, Rows rows) {
  int64_t p = 0;
  for (; p + kRows <= pixels; p += kRows) rows.template operator()<kRows>(p);
  for (; p < pixels; ++p) rows.template operator()<1>(p);
}

template <int kLanes, int kB>
void interleaved_apply(const Tile& t) {
  if constexpr (kLanes > 1) {
    if (t.channels < kLanes) return interleaved_apply<kLanes / 2, kB>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  by_rows(t.pixels, [&]<int kN>(int64_t p) {
    cover<kLanes>(t.channels, [&](int64_t c) {
      const Line<kLanes, kB> line(t, [c](const float* v) { return S::load(v + c); });
#pragma GCC unroll 4
      for (int r = 0; r < kN; ++r) {
        Vec d[kB];
        line.deviations(t, p + r, c, d);
        S::save(t.out[0] + (p + r) * t.out_pitch + c, line.cut(line.z(d)));
      }
    });
  });
}

template <int kLanes, int kB>
void interleaved_grad_sums(const Tile& t) {
  if constexpr (kLanes > 1) {
    if (t.channels < kLanes) return interleaved_grad_sums<kLanes / 2, kB>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  cover<kLanes>(t.channels, [&](int64_t c) {
    const Line<kLanes, kB> line(t, [c](const float* v) { return S::load(v + c); });
    Vec sum[1 + kB] = {};
    for (int64_t p = 0; p < t.pixels; ++p) {
      Vec d[kB];
      line.deviations(t, p, c, d);
      const Vec g = line.grad(line.z(d), S::load(t.grad + p * t.grad_pitch + c, t.grad_ahead));
      sum[0] += g;
#pragma GCC unroll 4
      for (int i = 0; i < kB; ++i) sum[1 + i] += g * d[i];
    }
#pragma GCC unroll 5
    for (int i = 0; i <= kB; ++i) S::save(t.sums + i * t.channels + c, sum[i]);
  });
}

template <int kLanes, int kB, bool kBatch>
void interleaved_grad(const Tile& t) {
  if constexpr (kLanes > 1) {
    if (t.channels < kLanes) return interleaved_grad<kLanes / 2, kB, kBatch>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  by_rows(t.pixels, [&]<int kN>(int64_t p) {
    cover<kLanes>(t.channels, [&](int64_t c) {
      const Line<kLanes, kB> line(t, [c](const float* v) { return S::load(v + c); });
#pragma GCC unroll 4
      for (int r = 0; r < kN; ++r) {
        Vec d[kB];
        line.deviations(t, p + r, c, d);
        const Vec g = line.grad(line.z(d), S::load(t.grad + (p + r) * t.grad_pitch + c, t.grad_ahead));
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) {
          if (t.out[i] == nullptr) continue;
          Vec dx = line.scale[i] * g;
          if constexpr (kBatch) dx = line.scale[i] * g + (S::load(t.slope[i] + c) * d[i] + S::load(t.offset[i] + c));
          S::save(t.out[i] + (p + r) * t.out_pitch + c, dx);
        }
      }
    });
  });
}

// 16-bit storage.

inline void widen(const void* from, DType dtype, int64_t count, float* to) {
  constexpr int kLanes = 8;
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  typedef uint32_t Word __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  const uint16_t* half = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  if (dtype == DType::F32) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * 4);
    return;
  }
  if (dtype == DType::BF16)
    for (; i + kLanes <= count; i += kLanes)
      *reinterpret_cast<Word*>(to + i) = __builtin_convertvector(*reinterpret_cast<const Half*>(half + i), Word) << 16;
  else
    for (; i + kF16Lanes <= count; i += kF16Lanes) F16::widen(half + i, to + i);
  for (; i < count; ++i) to[i] = load_float(from, dtype, i);
}

inline void narrow(const float* from, DType dtype, int64_t count, void* to) {
  constexpr int kLanes = 8;
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  typedef uint32_t Word __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  uint16_t* half = static_cast<uint16_t*>(to);
  int64_t i = 0;
  if (dtype == DType::F32) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * 4);
    return;
  }
  if (dtype == DType::BF16) {
    for (; i + kLanes <= count; i += kLanes) {
      const Word bits = *reinterpret_cast<const Word*>(from + i);
      const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
      const Word nan = Word{} + 0x7fc0u;
      const Word kept = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
      *reinterpret_cast<Half*>(half + i) = __builtin_convertvector(kept, Half);
    }
  } else {
    for (; i + kF16Lanes <= count; i += kF16Lanes) F16::narrow(from + i, half + i);
  }
  for (; i < count; ++i) store_float(to, dtype, i, from[i]);
}

inline void stream(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i < count && reinterpret_cast<uintptr_t>(to + i) % (kStreamLanes * 4) != 0; ++i) to[i] = from[i];
  for (; i + kStreamLanes <= count; i += kStreamLanes) Streaming::save(to + i, from + i);
  for (; i < count; ++i) to[i] = from[i];
  Streaming::done();
}

template <int kLanes>
constexpr Kernels make_table() {
  return {{planar_moments<kLanes>,
           {planar_apply<kLanes, 1>, planar_apply<kLanes, 2>, planar_apply<kLanes, 3>, planar_apply<kLanes, 4>},
           {planar_grad_sums<kLanes, 1>, planar_grad_sums<kLanes, 2>, planar_grad_sums<kLanes, 3>,
            planar_grad_sums<kLanes, 4>},
           {planar_grad<kLanes, 1, true>, planar_grad<kLanes, 2, true>, planar_grad<kLanes, 3, true>,
            planar_grad<kLanes, 4, true>},
           {planar_grad<kLanes, 1, false>, planar_grad<kLanes, 2, false>, planar_grad<kLanes, 3, false>,
            planar_grad<kLanes, 4, false>}},
          {interleaved_moments<kLanes>,
           {interleaved_apply<kLanes, 1>, interleaved_apply<kLanes, 2>, interleaved_apply<kLanes, 3>,
            interleaved_apply<kLanes, 4>},
           {interleaved_grad_sums<kLanes, 1>, interleaved_grad_sums<kLanes, 2>, interleaved_grad_sums<kLanes, 3>,
            interleaved_grad_sums<kLanes, 4>},
           {interleaved_grad<kLanes, 1, true>, interleaved_grad<kLanes, 2, true>, interleaved_grad<kLanes, 3, true>,
            interleaved_grad<kLanes, 4, true>},
           {interleaved_grad<kLanes, 1, false>, interleaved_grad<kLanes, 2, false>, interleaved_grad<kLanes, 3, false>,
            interleaved_grad<kLanes, 4, false>}},
          widen,
          narrow,
          stream};
}
