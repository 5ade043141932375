// The inner loops, written once over the number of lanes. Included by ukernel_<isa>.cpp inside that set's namespace and
// after its target pragma, behind lanes_impl.h and activation_impl.h; includes nothing itself, so that no library code
// is compiled for the set. (No include guard: each file includes it once, in its own namespace.)

// kRows x 16 accumulators. AVX2: 6 rows x 2 vectors = 12 accumulators + 2 weights + 1 broadcast of 16 registers.
// AVX-512: 12 rows x 1 vector of 32. The compiler contracts a * b + c to one FMA where the set has it.
template <int kLanes, int kPitch, int kRows>
void tile_rows(const float* const* a, int64_t a_offset, int64_t taps, int64_t k, const float* b, int64_t tap_stride,
               bool more, float* c) {
  using S = Lanes<kLanes>;
  constexpr int kVecs = 16 / kLanes;
  typename S::Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[r][v] = more ? S::load(c + r * 16 + v * kLanes) : typename S::Vec{};
  for (int64_t t = 0; t < taps; ++t) {
    const float* row[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) row[r] = a[t * kPitch + r] + a_offset;
    const float* bt = b + t * tap_stride;
    for (int64_t i = 0; i < k; ++i) {
      typename S::Vec w[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) w[v] = S::load(bt + i * 16 + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const float x = row[r][i];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] += x * w[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) S::save(c + r * 16 + v * kLanes, acc[r][v]);
}

// Picks the instance for n rows, 1 <= n <= kRows.
template <int kLanes, int kPitch, int kRows>
void tile_n(int64_t n, const float* const* a, int64_t a_offset, int64_t taps, int64_t k, const float* b,
            int64_t tap_stride, bool more, float* c) {
  if constexpr (kRows > 1) {
    if (n < kRows) return tile_n<kLanes, kPitch, kRows - 1>(n, a, a_offset, taps, k, b, tap_stride, more, c);
  }
  tile_rows<kLanes, kPitch, kRows>(a, a_offset, taps, k, b, tap_stride, more, c);
}

template <int kLanes, int kPitch>
void tile(int64_t n, const float* const* a, int64_t a_offset, int64_t taps, int64_t k, const float* b,
          int64_t tap_stride, bool more, float* c) {
  tile_n<kLanes, kPitch, kPitch>(n, a, a_offset, taps, k, b, tap_stride, more, c);
}

// Comparisons are ordered so that NaN passes through, as in torch.
template <int kLanes, class Vec>
inline Vec activate(Vec v, Act act) {
  const Vec zero{};
  switch (act) {
    case Act::None:
      return v;
    case Act::Relu:
      return v < zero ? zero : v;
    case Act::Relu6: {
      const Vec six = zero + 6.0f;
      v = v < zero ? zero : v;
      return v > six ? six : v;
    }
    case Act::Hardswish:
    case Act::Silu:
      return curve<kLanes>(v, act);
  }
  return v;
}

// One store per element: act(c * scale + shift + residual), in this order (kernels of the whole package agree on it).
// Whole rows of 16 fp32 channels straight from and to memory, one table row for all.
template <int kLanes, Act kAct>
void store_rows(const Store& s, const float* c) {
  using S = Lanes<kLanes>;
  using Vec = typename S::Vec;
  constexpr int kVecs = 16 / kLanes;
  Vec scale[kVecs], shift[kVecs];
  const bool scaled = s.scale[0] != nullptr, shifted = s.shift[0] != nullptr;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    scale[v] = scaled ? S::load(s.scale[0] + v * kLanes) : Vec{} + 1.0f;
    shift[v] = shifted ? S::load(s.shift[0] + v * kLanes) : Vec{};
  }
  for (int64_t r = 0; r < s.rows; ++r) {
    float* out = static_cast<float*>(s.y[r]);
    const float* residual = static_cast<const float*>(s.residual[r]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      Vec value = S::load(c + r * 16 + v * kLanes) * scale[v] + shift[v];
      if (s.has_residual) value += S::load(residual + v * kLanes);
      S::save(out + v * kLanes, activate<kLanes>(value, kAct));
    }
  }
}

template <int kLanes>
void store(const Store& s, const float* c) {
  using S = Lanes<kLanes>;
  using Vec = typename S::Vec;
  if (s.one_table && s.cols == 16 && s.y_dtype == DType::F32 && s.y_sc == 1 &&
      (!s.has_residual || (s.residual_dtype == DType::F32 && s.residual_sc == 1))) {
    switch (s.act) {
      case Act::Relu:
        return store_rows<kLanes, Act::Relu>(s, c);
      case Act::Relu6:
        return store_rows<kLanes, Act::Relu6>(s, c);
      case Act::Hardswish:
        return store_rows<kLanes, Act::Hardswish>(s, c);
      case Act::Silu:
        return store_rows<kLanes, Act::Silu>(s, c);
      default:
        return store_rows<kLanes, Act::None>(s, c);
    }
  }
  for (int64_t r = 0; r < s.rows; ++r) {
    float line[16], add[16], factor[16], addend[16];
    const float* in = c + r * 16;
    // A whole row of 16 fp32 channels goes straight to memory; anything else goes through `line`.
    const bool full = s.cols == 16;
    const float* scale = s.scale[s.one_table ? 0 : r];
    const float* shift = s.shift[s.one_table ? 0 : r];
    for (int64_t i = 0; i < 16; ++i) {
      factor[i] = scale == nullptr ? 1.0f : i < s.cols ? scale[i] : 0.0f;
      addend[i] = shift == nullptr ? 0.0f : i < s.cols ? shift[i] : 0.0f;
    }
    const float* residual = nullptr;
    if (s.has_residual) {
      if (full && s.residual_dtype == DType::F32 && s.residual_sc == 1) {
        residual = static_cast<const float*>(s.residual[r]);
      } else {
        for (int64_t i = 0; i < 16; ++i)
          add[i] = i < s.cols ? load_float(s.residual[r], s.residual_dtype, i * s.residual_sc) : 0.0f;
        residual = add;
      }
    }
    const bool straight = full && s.y_dtype == DType::F32 && s.y_sc == 1;
    float* out = straight ? static_cast<float*>(s.y[r]) : line;
#pragma GCC unroll 4
    for (int v = 0; v < 16; v += kLanes) {
      // The same expression as in store_rows, so that both contract to the same instruction.
      Vec value = S::load(in + v) * S::load(factor + v) + S::load(addend + v);
      if (residual != nullptr) value += S::load(residual + v);
      S::save(out + v, activate<kLanes>(value, s.act));
    }
    if (!straight) {
      if (s.y_dtype == DType::F32) {
        float* y = static_cast<float*>(s.y[r]);
        for (int64_t i = 0; i < s.cols; ++i) y[i * s.y_sc] = line[i];
      } else {
        for (int64_t i = 0; i < s.cols; ++i) store_float(s.y[r], s.y_dtype, i * s.y_sc, line[i]);
      }
    }
  }
}
