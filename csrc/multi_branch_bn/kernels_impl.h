// The inner loops, written once over the number of lanes. Included by kernels_<isa>.cpp inside that set's namespace and
// after its target pragma; includes nothing itself, so that no library code is compiled for the set. That file has
// defined F16, the conversion of kF16Lanes half-precision numbers at a time, and Streaming, stores of kStreamLanes
// numbers past the caches.
// (No include guard: each file includes it once, in its own namespace.)

template <int kLanes>
struct Simd : Lanes<kLanes> {
  using typename Lanes<kLanes>::Vec;
  using Lanes<kLanes>::load, Lanes<kLanes>::save;
  // The same, and the line `ahead` of it into the L2 cache: the processor's own prefetchers end at pages and lose the
  // rows of a strip.
  static Vec load(const float* p, int64_t ahead) {
    __builtin_prefetch(p + ahead, 0, 2);
    return load(p);
  }
  // Past the caches, to an address that is a multiple of the vector.
  static void stream(float* p, Vec v) {
    for (int i = 0; i < kLanes; i += kStreamLanes) Streaming::save(p + i, reinterpret_cast<const float*>(&v) + i);
  }
  template <bool kPast>
  static void save(float* p, Vec v) {
    if constexpr (kPast)
      stream(p, v);
    else
      save(p, v);
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

// What to prefetch in a run of pixels: up to `end` what follows kAhead pixels later, from there on what the runs behind
// it begin with. The way there is far[i] for x[i] and far[kB] for grad.
template <int kLanes, int kB>
struct Lead {
  int64_t end, near[kB + 1], far[kB + 1];

  explicit Lead(const Tile& t) : end(t.pixels >= 2 * kAhead ? (t.pixels - kAhead) / (2 * kLanes) * (2 * kLanes) : 0) {
    const int64_t runs = end > 0 || t.pixels == 0 ? 1 : (kAhead + t.pixels - 1) / t.pixels;
    for (int i = 0; i <= kB; ++i) near[i] = kAhead, far[i] = runs * (i < kB ? t.x_ahead[i] : t.grad_ahead) - end;
  }
  // Calls part(begin, end, ahead) for the parts of a run.
  template <class Part>
  __attribute__((always_inline)) void parts(int64_t pixels, Part part) const {
    if (end > 0) part(int64_t{0}, end, near);
    part(end, pixels, far);
  }
};

template <int kLanes, int kB>
void planar_moments(const Tile& t) {
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  Vec center[kB], first[kB][2] = {}, second[kB][2] = {};
#pragma GCC unroll 4
  for (int i = 0; i < kB; ++i) center[i] = S::fill(*t.mean[i]);
  const Lead<kLanes, kB> lead(t);
  for (int64_t r = 0; r < t.planes; ++r) {
    lead.parts(t.pixels, [&](int64_t p, int64_t end, const int64_t* ahead) __attribute__((always_inline)) {
      for (; p + 2 * kLanes <= end; p += 2 * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) {
          const float* x = t.x[i] + r * t.x_pitch[i] + p;
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const Vec d = S::load(x + v * kLanes, ahead[i]) - center[i];
            first[i][v] += d;
            second[i][v] += d * d;
          }
        }
      }
      for (; p < end; p += kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) {
          const float* x = t.x[i] + r * t.x_pitch[i];
          const Vec d =
              (p + kLanes <= end ? S::load(x + p, ahead[i]) : S::load_last(x, end, end - p, center[i])) - center[i];
          first[i][0] += d;
          second[i][0] += d * d;
        }
      }
    });
  }
  for (int i = 0; i < kB; ++i) {
    t.sums[2 * i] = S::sum(first[i][0] + first[i][1]);
    t.sums[2 * i + 1] = S::sum(second[i][0] + second[i][1]);
  }
}

// Calls step(p) for vectors that cover all pixels from p on. The last one may overlap the one before it, which writes
// the same again; runs shorter than a vector take narrower ones.
template <int kLanes, class Step>
__attribute__((always_inline)) inline void cover(int64_t p, int64_t count, Step step) {
  for (; p + kLanes <= count; p += kLanes) step(p);
  if (p < count) step(count - kLanes);
}

template <int kLanes, int kB, bool kPast = false>
void planar_apply(const Tile& t) {
  if constexpr (kLanes > 1 && !kPast) {
    if (t.pixels < kLanes) return planar_apply<kLanes / 2, kB>(t);
    if constexpr (kLanes >= kStreamLanes)
      if (t.past) return planar_apply<kLanes, kB, true>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  const Line<kLanes, kB> line(t, [](const float* v) { return S::fill(*v); });
  const Lead<kLanes, kB> lead(t);
  for (int64_t r = 0; r < t.planes; ++r) {
    lead.parts(t.pixels, [&](int64_t begin, int64_t end, const int64_t* ahead) __attribute__((always_inline)) {
      cover<kLanes>(begin, end, [&](int64_t p) __attribute__((always_inline)) {
        Vec d[kB];
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) d[i] = S::load(t.x[i] + r * t.x_pitch[i] + p, ahead[i]) - line.mean[i];
        S::template save<kPast>(t.out[0] + r * t.out_pitch + p, line.cut(line.z(d)));
      });
    });
  }
}

template <int kLanes, int kB>
void planar_grad_sums(const Tile& t) {
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  const Line<kLanes, kB> line(t, [](const float* v) { return S::fill(*v); });
  Vec sum[1 + kB] = {};
  const auto add = [&](Vec grad_y, const Vec* x) __attribute__((always_inline)) {
    Vec d[kB];
#pragma GCC unroll 4
    for (int i = 0; i < kB; ++i) d[i] = x[i] - line.mean[i];
    const Vec g = line.grad(line.z(d), grad_y);
    sum[0] += g;
#pragma GCC unroll 4
    for (int i = 0; i < kB; ++i) sum[1 + i] += g * d[i];
  };
  Vec x[kB];
  const Lead<kLanes, kB> lead(t);
  for (int64_t r = 0; r < t.planes; ++r) {
    const float* grad = t.grad + r * t.grad_pitch;
    lead.parts(t.pixels, [&](int64_t p, int64_t end, const int64_t* ahead) __attribute__((always_inline)) {
      for (; p + kLanes <= end; p += kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) x[i] = S::load(t.x[i] + r * t.x_pitch[i] + p, ahead[i]);
        add(S::load(grad + p, ahead[kB]), x);
      }
      if (p < end) {
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) x[i] = S::load_last(t.x[i] + r * t.x_pitch[i], end, end - p, line.mean[i]);
        add(S::load_last(grad, end, end - p, Vec{}), x);
      }
    });
  }
  for (int i = 0; i <= kB; ++i) t.sums[i] = S::sum(sum[i]);
}

template <int kLanes, int kB, bool kBatch, bool kPast = false>
void planar_grad(const Tile& t) {
  if constexpr (kLanes > 1 && !kPast) {
    if (t.pixels < kLanes) return planar_grad<kLanes / 2, kB, kBatch>(t);
    if constexpr (kLanes >= kStreamLanes)
      if (t.past) return planar_grad<kLanes, kB, kBatch, true>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  const Line<kLanes, kB> line(t, [](const float* v) { return S::fill(*v); });
  Vec slope[kB], offset[kB];
  for (int i = 0; i < kB && kBatch; ++i) slope[i] = S::fill(*t.slope[i]), offset[i] = S::fill(*t.offset[i]);
  const Lead<kLanes, kB> lead(t);
  for (int64_t r = 0; r < t.planes; ++r) {
    lead.parts(t.pixels, [&](int64_t begin, int64_t end, const int64_t* ahead) __attribute__((always_inline)) {
      cover<kLanes>(begin, end, [&](int64_t p) __attribute__((always_inline)) {
        Vec d[kB];
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) d[i] = S::load(t.x[i] + r * t.x_pitch[i] + p, ahead[i]) - line.mean[i];
        const Vec g = line.grad(line.z(d), S::load(t.grad + r * t.grad_pitch + p, ahead[kB]));
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) {
          if (t.out[i] == nullptr) continue;
          Vec dx = line.scale[i] * g;
          if constexpr (kBatch) dx = line.scale[i] * g + (slope[i] * d[i] + offset[i]);
          S::template save<kPast>(t.out[i] + r * t.out_pitch + p, dx);
        }
      });
    });
  }
}

// Interleaved: the lanes are channels of one pixel. The last vector of channels may overlap the one before it. Tiles
// are gone through in strips of a few pixels, all channels of a strip before the next one: a tensor is read as it lies.

constexpr int kRows = 4;  // pixels that share one load of the coefficients

// Calls rows.template run<n>(p) for pixels p, p + 1, .. p + n - 1 until all are done.
template <class Rows>
__attribute__((always_inline)) inline void by_rows(int64_t pixels, Rows rows) {
  int64_t p = 0;
  for (; p + kRows <= pixels; p += kRows) rows.template operator()<kRows>(p);
  for (; p < pixels; ++p) rows.template operator()<1>(p);
}

// Sums over the pixels of a tile, kSums a channel, a row of vectors each. The vector that overlaps the one before it
// has a place of its own, so that nothing is added twice.
template <int kLanes, int kSums>
struct Sums {
  using S = Simd<kLanes>;
  float at[kSums][kBlock + kLanes];

  explicit Sums(int64_t channels) {
    for (int i = 0; i < kSums; ++i)
      for (int64_t c = 0; c < channels; c += kLanes) S::save(at[i] + c, typename S::Vec{});
  }
  static int64_t place(int64_t c) { return (c + kLanes - 1) / kLanes * kLanes; }
  void store(int64_t channels, float* to) const {
    for (int i = 0; i < kSums; ++i, to += channels)
      cover<kLanes>(0, channels,
                    [&](int64_t c) __attribute__((always_inline)) { S::save(to + c, S::load(at[i] + place(c))); });
  }
};

template <int kLanes, int kB>
void interleaved_moments(const Tile& t) {
  if constexpr (kLanes > 1) {
    if (t.channels < kLanes) return interleaved_moments<kLanes / 2, kB>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  Sums<kLanes, 2 * kB> sums(t.channels);
  by_rows(t.pixels, [&]<int kN>(int64_t p) __attribute__((always_inline)) {
    cover<kLanes>(0, t.channels, [&](int64_t c) __attribute__((always_inline)) {
      const int64_t at = sums.place(c);
#pragma GCC unroll 4
      for (int i = 0; i < kB; ++i) {
        const Vec center = S::load(t.mean[i] + c);
        Vec first = S::load(sums.at[2 * i] + at), second = S::load(sums.at[2 * i + 1] + at);
#pragma GCC unroll 4
        for (int r = 0; r < kN; ++r) {
          const Vec d = S::load(t.x[i] + (p + r) * t.x_pitch[i] + c, t.x_ahead[i]) - center;
          first += d;
          second += d * d;
        }
        S::save(sums.at[2 * i] + at, first);
        S::save(sums.at[2 * i + 1] + at, second);
      }
    });
  });
  sums.store(t.channels, t.sums);
}

template <int kLanes, int kB, bool kPast = false>
void interleaved_apply(const Tile& t) {
  if constexpr (kLanes > 1 && !kPast) {
    if (t.channels < kLanes) return interleaved_apply<kLanes / 2, kB>(t);
    if constexpr (kLanes >= kStreamLanes)
      if (t.past) return interleaved_apply<kLanes, kB, true>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  by_rows(t.pixels, [&]<int kN>(int64_t p) __attribute__((always_inline)) {
    cover<kLanes>(0, t.channels, [&](int64_t c) __attribute__((always_inline)) {
      const Line<kLanes, kB> line(t, [c](const float* v) __attribute__((always_inline)) { return S::load(v + c); });
#pragma GCC unroll 4
      for (int r = 0; r < kN; ++r) {
        Vec d[kB];
        line.deviations(t, p + r, c, d);
        S::template save<kPast>(t.out[0] + (p + r) * t.out_pitch + c, line.cut(line.z(d)));
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
  Sums<kLanes, 1 + kB> sums(t.channels);
  by_rows(t.pixels, [&]<int kN>(int64_t p) __attribute__((always_inline)) {
    cover<kLanes>(0, t.channels, [&](int64_t c) __attribute__((always_inline)) {
      const Line<kLanes, kB> line(t, [c](const float* v) __attribute__((always_inline)) { return S::load(v + c); });
      const int64_t at = sums.place(c);
      Vec sum[1 + kB];
#pragma GCC unroll 5
      for (int i = 0; i <= kB; ++i) sum[i] = S::load(sums.at[i] + at);
#pragma GCC unroll 4
      for (int r = 0; r < kN; ++r) {
        Vec d[kB];
        line.deviations(t, p + r, c, d);
        const Vec g = line.grad(line.z(d), S::load(t.grad + (p + r) * t.grad_pitch + c, t.grad_ahead));
        sum[0] += g;
#pragma GCC unroll 4
        for (int i = 0; i < kB; ++i) sum[1 + i] += g * d[i];
      }
#pragma GCC unroll 5
      for (int i = 0; i <= kB; ++i) S::save(sums.at[i] + at, sum[i]);
    });
  });
  sums.store(t.channels, t.sums);
}

template <int kLanes, int kB, bool kBatch, bool kPast = false>
void interleaved_grad(const Tile& t) {
  if constexpr (kLanes > 1 && !kPast) {
    if (t.channels < kLanes) return interleaved_grad<kLanes / 2, kB, kBatch>(t);
    if constexpr (kLanes >= kStreamLanes)
      if (t.past) return interleaved_grad<kLanes, kB, kBatch, true>(t);
  }
  using S = Simd<kLanes>;
  using Vec = typename S::Vec;
  by_rows(t.pixels, [&]<int kN>(int64_t p) __attribute__((always_inline)) {
    cover<kLanes>(0, t.channels, [&](int64_t c) __attribute__((always_inline)) {
      const Line<kLanes, kB> line(t, [c](const float* v) __attribute__((always_inline)) { return S::load(v + c); });
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
          S::template save<kPast>(t.out[i] + (p + r) * t.out_pitch + c, dx);
        }
      }
    });
  });
}

// See Kernels. A loop over doubles, which the compiler makes vectors of.
inline void move_moments(const float* part, int64_t channels, double n, const float* pivot, float* center,
                         double* first, double* second) {
  const float share = static_cast<float>(1 / n);
  for (int64_t c = 0; c < channels; ++c) {
    const double sum = part[c], d = static_cast<double>(center[c]) - pivot[c];
    first[c] += sum + n * d;
    second[c] += part[channels + c] + d * (2 * sum + n * d);
    center[c] += part[c] * share;
  }
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
}

inline void streamed() { Streaming::done(); }

template <int kLanes>
constexpr Kernels make_table() {
  return {{{planar_moments<kLanes, 1>, planar_moments<kLanes, 2>, planar_moments<kLanes, 3>, planar_moments<kLanes, 4>},
           {planar_apply<kLanes, 1>, planar_apply<kLanes, 2>, planar_apply<kLanes, 3>, planar_apply<kLanes, 4>},
           {planar_grad_sums<kLanes, 1>, planar_grad_sums<kLanes, 2>, planar_grad_sums<kLanes, 3>,
            planar_grad_sums<kLanes, 4>},
           {planar_grad<kLanes, 1, true>, planar_grad<kLanes, 2, true>, planar_grad<kLanes, 3, true>,
            planar_grad<kLanes, 4, true>},
           {planar_grad<kLanes, 1, false>, planar_grad<kLanes, 2, false>, planar_grad<kLanes, 3, false>,
            planar_grad<kLanes, 4, false>}},
          {{interleaved_moments<kLanes, 1>, interleaved_moments<kLanes, 2>, interleaved_moments<kLanes, 3>,
            interleaved_moments<kLanes, 4>},
           {interleaved_apply<kLanes, 1>, interleaved_apply<kLanes, 2>, interleaved_apply<kLanes, 3>,
            interleaved_apply<kLanes, 4>},
           {interleaved_grad_sums<kLanes, 1>, interleaved_grad_sums<kLanes, 2>, interleaved_grad_sums<kLanes, 3>,
            interleaved_grad_sums<kLanes, 4>},
           {interleaved_grad<kLanes, 1, true>, interleaved_grad<kLanes, 2, true>, interleaved_grad<kLanes, 3, true>,
            interleaved_grad<kLanes, 4, true>},
           {interleaved_grad<kLanes, 1, false>, interleaved_grad<kLanes, 2, false>, interleaved_grad<kLanes, 3, false>,
            interleaved_grad<kLanes, 4, false>}},
          move_moments,
          widen,
          narrow,
          stream,
          streamed};
}
