// The inner loops, written once on vectors of 8 lanes. Included by kernels_<isa>.cpp inside that set's namespace and
// after its target pragma; includes nothing itself, so that no library code is compiled for the set.
// (No include guard: each file includes it once, in its own namespace.)

typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Index __attribute__((vector_size(32)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Quad load4(const float* p) { return *reinterpret_cast<const Quad*>(p); }
inline void save(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

inline Vec shuffle(Vec a, Vec b, Index which) {
#if defined(__clang__)
  Vec out;
  for (int i = 0; i < 8; ++i) out[i] = which[i] < 8 ? a[which[i]] : b[which[i] - 8];
  return out;
#else
  return __builtin_shuffle(a, b, which);
#endif
}

inline Vec join(Quad low, Quad high) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return Vec{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
#endif
}

// --- codes
// -------------------------------------------------------------------------------------------------------------

// 16 bytes of unsigned numbers, and the halves of two of them taken turn by turn (punpckl, punpckh).
template <class Number>
struct Word {
  typedef Number Vec __attribute__((vector_size(16), aligned(sizeof(Number)), may_alias));
};
typedef Word<uint8_t>::Vec Bytes;
typedef Word<uint16_t>::Vec Shorts;
typedef Word<uint32_t>::Vec Ints;

#if defined(__clang__)
template <class V>
inline V pick(V a, V b, V which) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  V out;
  for (int i = 0; i < kCount; ++i) out[i] = which[i] < kCount ? a[which[i]] : b[which[i] - kCount];
  return out;
}
#else
template <class V>
inline V pick(V a, V b, V which) {
  return __builtin_shuffle(a, b, which);
}
#endif
inline Bytes low(Bytes a, Bytes b) { return pick(a, b, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}); }
inline Bytes high(Bytes a, Bytes b) {
  return pick(a, b, Bytes{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}
inline Shorts low(Shorts a, Shorts b) { return pick(a, b, Shorts{0, 8, 1, 9, 2, 10, 3, 11}); }
inline Shorts high(Shorts a, Shorts b) { return pick(a, b, Shorts{4, 12, 5, 13, 6, 14, 7, 15}); }
inline Ints low(Ints a, Ints b) { return pick(a, b, Ints{0, 4, 1, 5}); }
inline Ints high(Ints a, Ints b) { return pick(a, b, Ints{2, 6, 3, 7}); }

// out[i * 16 + r] = codes[r * pitch + i] for 16 x 16 numbers, in squares as wide as a word: log2 of that perfect
// shuffles of its rows transpose a square.
template <class Number>
inline void transpose_codes(const Number* codes, int64_t pitch, int64_t rows, Number* out) {
  typedef typename Word<Number>::Vec V;
  constexpr int kSide = 16 / sizeof(Number);
  for (int64_t r = 0; r < 16; r += kSide) {
    for (int64_t i = 0; i < 16; i += kSide) {
      V in[kSide], next[kSide];
#pragma GCC unroll 16
      for (int k = 0; k < kSide; ++k)
        in[k] = *reinterpret_cast<const V*>(codes + (r + k < rows ? r + k : 0) * pitch + i);
#pragma GCC unroll 4
      for (int step = 1; step < kSide; step *= 2) {
#pragma GCC unroll 8
        for (int k = 0; k < kSide / 2; ++k) {
          next[2 * k] = low(in[k], in[k + kSide / 2]);
          next[2 * k + 1] = high(in[k], in[k + kSide / 2]);
        }
#pragma GCC unroll 16
        for (int k = 0; k < kSide; ++k) in[k] = next[k];
      }
#pragma GCC unroll 16
      for (int k = 0; k < kSide; ++k) *reinterpret_cast<V*>(out + (i + k) * 16 + r) = in[k];
    }
  }
}

// Codes compared as unsigned numbers of their own width, so that 16 or 32 fit a vector: a negative one is then larger
// than every code that may exist.
template <class Code>
struct Plain;
template <>
struct Plain<uint8_t> {
  typedef uint8_t Type;
  static constexpr uint32_t kMost = 0xff;
};
template <>
struct Plain<int16_t> {
  typedef uint16_t Type;
  static constexpr uint32_t kMost = 0x7fff;
};
template <>
struct Plain<uint16_t> {
  typedef uint16_t Type;
  static constexpr uint32_t kMost = 0xffff;
};
template <>
struct Plain<int32_t> {
  typedef uint32_t Type;
  static constexpr uint32_t kMost = 0x7fffffff;
};

// Plain loops, which the compiler turns into vectors.
template <class Code>
inline Code largest(const Code* codes, int64_t count) {
  Code most = 0;
  for (int64_t i = 0; i < count; ++i) most = codes[i] > most ? codes[i] : most;
  return most;
}

template <class Code>
bool offsets_of(const void* from, int64_t pitch, int64_t rows, int64_t count, uint32_t last, uint32_t d,
                uint32_t* out) {
  typedef typename Plain<Code>::Type Number;
  const Number* codes = static_cast<const Number*>(from);
  const uint32_t limit = last < Plain<Code>::kMost ? last : Plain<Code>::kMost;
  Number block[16 * kOutputs];
  bool good = true;
  for (int64_t begin = 0; begin < count; begin += 16, out += 16 * kOutputs) {
    const int64_t length = count - begin < 16 ? count - begin : 16;
    // The same place of the next panel: 16 streams are more than some prefetchers follow.
    if (begin % 64 == 0)
      for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(codes + (r + kOutputs) * pitch + begin);
    if (length == 16) {
      transpose_codes(codes + begin, pitch, rows, block);
    } else {
      for (int64_t r = 0; r < kOutputs; ++r) {
        const Number* row = codes + (r < rows ? r : 0) * pitch + begin;
        for (int64_t i = 0; i < length; ++i) block[i * kOutputs + r] = row[i];
      }
    }
    if (limit < Number(~Number{0}) && largest(block, length * kOutputs) > limit) {
      good = false;
      for (int64_t i = 0; i < length * kOutputs; ++i) block[i] = block[i] < limit ? block[i] : Number(limit);
    }
    for (int64_t i = 0; i < length * kOutputs; ++i) out[i] = block[i] * d;
  }
  return good;
}

bool offsets(const void* codes, CodeType type, int64_t pitch, int64_t rows, int64_t count, uint32_t last, uint32_t d,
             uint32_t* out) {
  return with_code(type, [&]<class Code>() { return offsets_of<Code>(codes, pitch, rows, count, last, d, out); });
}

// --- panels
// ------------------------------------------------------------------------------------------------------------

// Columns t .. t + 3 of 8 rows of the book, as 4 vectors of 8 rows: two 4 x 4 transposes side by side.
inline void transpose4(const float* const* rows, int64_t t, Vec* out) {
  Vec in[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) in[i] = join(load4(rows[i] + t), load4(rows[i + 4] + t));
  const Vec low01 = shuffle(in[0], in[1], Index{0, 8, 1, 9, 4, 12, 5, 13});
  const Vec high01 = shuffle(in[0], in[1], Index{2, 10, 3, 11, 6, 14, 7, 15});
  const Vec low23 = shuffle(in[2], in[3], Index{0, 8, 1, 9, 4, 12, 5, 13});
  const Vec high23 = shuffle(in[2], in[3], Index{2, 10, 3, 11, 6, 14, 7, 15});
  out[0] = shuffle(low01, low23, Index{0, 1, 8, 9, 4, 5, 12, 13});
  out[1] = shuffle(low01, low23, Index{2, 3, 10, 11, 6, 7, 14, 15});
  out[2] = shuffle(high01, high23, Index{0, 1, 8, 9, 4, 5, 12, 13});
  out[3] = shuffle(high01, high23, Index{2, 3, 10, 11, 6, 7, 14, 15});
}

// 8 x 8 numbers.
inline void transpose8(Vec* row) {
  Vec a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = shuffle(row[2 * i], row[2 * i + 1], Index{0, 8, 1, 9, 4, 12, 5, 13});
    a[2 * i + 1] = shuffle(row[2 * i], row[2 * i + 1], Index{2, 10, 3, 11, 6, 14, 7, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int from = i / 2 * 4 + i % 2;
    b[2 * i] = shuffle(a[from], a[from + 2], Index{0, 1, 8, 9, 4, 5, 12, 13});
    b[2 * i + 1] = shuffle(a[from], a[from + 2], Index{2, 3, 10, 11, 6, 7, 14, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    row[i] = shuffle(b[i], b[4 + i], Index{0, 1, 2, 3, 8, 9, 10, 11});
    row[i + 4] = shuffle(b[i], b[4 + i], Index{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

// Writes (or, for a later additive stage, adds) 8 book rows of d numbers to `shift` past the d columns of a panel.
template <int kD, bool kAdd>
inline void place_rows(const float* book, const uint32_t* offsets, int64_t d, float* const* columns, int64_t shift) {
  const int64_t length = kD > 0 ? kD : d;
  const float* rows[8];  // in registers: read again after every store they would cost as much as the rows
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) rows[r] = book + offsets[r];
  int64_t t = 0;
#pragma GCC unroll 4
  for (; t + 4 <= length; t += 4) {
    Vec column[4];
    transpose4(rows, t, column);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* to = columns[t + i] + shift;
      save(to, kAdd ? load(to) + column[i] : column[i]);
    }
  }
#pragma GCC unroll 3
  for (; t < length; ++t) {
    float* to = columns[t] + shift;
    const Vec column = {rows[0][t], rows[1][t], rows[2][t], rows[3][t], rows[4][t], rows[5][t], rows[6][t], rows[7][t]};
    save(to, kAdd ? load(to) + column : column);
  }
}

template <int kD>
void panel_of(const float* book, const uint32_t* offsets, int64_t count, int64_t stages, int64_t d,
              float* const* columns, int64_t advance) {
  if (stages == 1) {
    for (int64_t i = 0; i < count; ++i, offsets += kOutputs) {
      place_rows<kD, false>(book, offsets, d, columns, i * advance);
      place_rows<kD, false>(book, offsets + 8, d, columns, i * advance + 8);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t s = 0; s < stages; ++s, offsets += kOutputs) {
      for (int64_t half = 0; half < kOutputs; half += 8) {
        if (s == 0)
          place_rows<kD, false>(book, offsets + half, d, columns, i * advance + half);
        else
          place_rows<kD, true>(book, offsets + half, d, columns, i * advance + half);
      }
    }
  }
}

void panel(const float* book, const uint32_t* offsets, int64_t count, int64_t stages, int64_t d, float* const* columns,
           int64_t advance) {
  switch (d) {
    case 4:
      return panel_of<4>(book, offsets, count, stages, d, columns, advance);
    case 8:
      return panel_of<8>(book, offsets, count, stages, d, columns, advance);
    case 9:
      return panel_of<9>(book, offsets, count, stages, d, columns, advance);
    case 18:
      return panel_of<18>(book, offsets, count, stages, d, columns, advance);
    default:
      return panel_of<0>(book, offsets, count, stages, d, columns, advance);
  }
}

// --- decode and multiply
// -----------------------------------------------------------------------------------------------

// The vector of one output at `offsets[0]`: kD = 4: this position and the next; else columns v .. v + 7 of this one.
template <int kD, bool kStaged>
inline Vec decode(const float* book, const uint32_t* offsets, int64_t v, int64_t stages) {
  const int64_t next = (kStaged ? stages : 1) * kOutputs;
  if constexpr (kD == 4) {
    Quad low = load4(book + offsets[0]), high = load4(book + offsets[next]);
    if constexpr (kStaged) {
      for (int64_t s = 1; s < stages; ++s) {
        low += load4(book + offsets[s * kOutputs]);
        high += load4(book + offsets[next + s * kOutputs]);
      }
    }
    return join(low, high);
  } else {
    Vec sum = load(book + offsets[0] + v);
    if constexpr (kStaged)
      for (int64_t s = 1; s < stages; ++s) sum += load(book + offsets[s * kOutputs] + v);
    return sum;
  }
}

template <int kD, bool kStaged, int kRows, int kOuts>
void dot_tile(const float* book, const uint32_t* offsets, int64_t count, int64_t stages, int64_t d,
              const float* const* x, float* acc) {
  Vec sum[kRows][kOuts];
  const float* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = x[r];
#pragma GCC unroll 16
    for (int o = 0; o < kOuts; ++o) sum[r][o] = load(acc + (r * kOutputs + o) * kLanes);
  }
  const int64_t step = (kD == 4 ? 2 : 1) * (kStaged ? stages : 1) * kOutputs, length = kD == 0 ? d : 8;
  const uint32_t* const end = offsets + count * (kStaged ? stages : 1) * kOutputs;
  for (int64_t column = 0; offsets != end; offsets += step) {
    for (int64_t v = 0; v < length; v += 8, column += 8) {
      Vec in[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) in[r] = load(row[r] + column);
      if constexpr (kRows == 1 && kD == 8 && !kStaged) {
        // Loads are what limits a single row: two offsets in one.
#pragma GCC unroll 8
        for (int o = 0; o < kOuts; o += 2) {
          uint64_t pair;
          __builtin_memcpy(&pair, offsets + o, sizeof(pair));
          sum[0][o] += in[0] * load(book + static_cast<uint32_t>(pair));
          sum[0][o + 1] += in[0] * load(book + (pair >> 32));
        }
        continue;
      }
#pragma GCC unroll 16
      for (int o = 0; o < kOuts; ++o) {
        const Vec w = decode<kD, kStaged>(book, offsets + o, v, stages);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][o] += in[r] * w;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int o = 0; o < kOuts; ++o) save(acc + (r * kOutputs + o) * kLanes, sum[r][o]);
}

// Picks the instance for n rows, 1 <= n <= kRows. Few rows take more outputs at once: 8 chains hide the latency.
template <int kD, bool kStaged, int kRows, int kOuts>
void dot_rows_n(const float* book, const uint32_t* offsets, int64_t count, int64_t stages, int64_t d,
                const float* const* x, int64_t rows, float* acc) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dot_rows_n<kD, kStaged, kRows - 1, kOuts>(book, offsets, count, stages, d, x, rows, acc);
  }
  constexpr int kWide = kRows == 1 ? 8 : kOuts;
  for (int64_t o = 0; o < kOutputs; o += kWide)
    dot_tile<kD, kStaged, kRows, kWide>(book, offsets + o, count, stages, d, x, acc + o * kLanes);
}

template <int kRows, int kOuts>
void dots(const float* book, const uint32_t* offsets, int64_t count, int64_t stages, int64_t d, const float* const* x,
          int64_t rows, float* acc) {
  if (stages > 1) {
    if (d == 4) return dot_rows_n<4, true, kRows, kOuts>(book, offsets, count, stages, d, x, rows, acc);
    return dot_rows_n<0, true, kRows, kOuts>(book, offsets, count, stages, d, x, rows, acc);
  }
  if (d == 4) return dot_rows_n<4, false, kRows, kOuts>(book, offsets, count, stages, d, x, rows, acc);
  if (d == 8) return dot_rows_n<8, false, kRows, kOuts>(book, offsets, count, stages, d, x, rows, acc);
  dot_rows_n<0, false, kRows, kOuts>(book, offsets, count, stages, d, x, rows, acc);
}

void reduce(const float* acc, int64_t count, float* c) {
  for (int64_t i = 0; i < count; i += 8) {
    Vec v[8];
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) v[l] = load(acc + (i + l) * kLanes);
    transpose8(v);
    save(c + i, ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])));
  }
}

// --- look-up tables
// ----------------------------------------------------------------------------------------------------

// Table rows as byte offsets, those of 4 positions of an output together.
template <class Code>
bool table_rows_of(const void* from, int64_t pitch, int64_t outputs, int64_t count, uint32_t last, uint16_t* out,
                   int64_t out_pitch) {
  typedef typename Plain<Code>::Type Number;
  const Number* codes = static_cast<const Number*>(from);
  const uint32_t limit = last < Plain<Code>::kMost ? last : Plain<Code>::kMost;
  const int64_t filled = (count + kTables - 1) / kTables * kTables;
  Number row[kTablePositions] = {}, most[kTablePositions] = {};
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t o = 0; o < outputs; ++o) {
      if (count == kTablePositions)
        __builtin_memcpy(row, codes + o * pitch, kTablePositions * sizeof(Number));
      else
        __builtin_memcpy(row, codes + o * pitch, count * sizeof(Number));
      for (int64_t i = 0; i < kTablePositions; ++i) most[i] = row[i] > most[i] ? row[i] : most[i];
      if (pass == 1)
        for (int64_t i = 0; i < kTablePositions; ++i) row[i] = row[i] < limit ? row[i] : Number(limit);
      uint16_t offset[kTablePositions];
      for (int64_t i = 0; i < kTablePositions; ++i) offset[i] = static_cast<uint16_t>(row[i] * (kLanes * 4));
      for (int64_t i = 0; i < filled; i += kTables)
        __builtin_memcpy(out + i / kTables * out_pitch + o * kTables, offset + i, kTables * sizeof(uint16_t));
    }
    if (largest(most, kTablePositions) <= limit) return pass == 0;
  }
  return false;
}

bool table_rows(const void* codes, CodeType type, int64_t pitch, int64_t outputs, int64_t count, uint32_t last,
                uint16_t* out, int64_t out_pitch) {
  return with_code(
      type, [&]<class Code>() { return table_rows_of<Code>(codes, pitch, outputs, count, last, out, out_pitch); });
}

template <int kLength>
void table_of(const float* book, int64_t entries, int64_t d, int64_t length, const float* x, float* out) {
  Vec in[kLength == 0 ? 1 : kLength];
  if constexpr (kLength > 0)
#pragma GCC unroll 8
    for (int t = 0; t < kLength; ++t) in[t] = load(x + t * kLanes);
  for (int64_t k = 0; k < entries; ++k, book += d) {
    Vec sum{};
    if constexpr (kLength > 0)
#pragma GCC unroll 8
      for (int t = 0; t < kLength; ++t) sum += book[t] * in[t];
    else
      for (int64_t t = 0; t < length; ++t) sum += book[t] * load(x + t * kLanes);
    save(out + k * kLanes, sum);
  }
}

void fill_table(const float* book, int64_t entries, int64_t d, int64_t length, const float* x, float* out) {
  if (length == 4) return table_of<4>(book, entries, d, length, x, out);
  if (length == 8) return table_of<8>(book, entries, d, length, x, out);
  table_of<0>(book, entries, d, length, x, out);
}

template <int kCount>
void lookup_n(const float* tables, const uint16_t* rows, int64_t outputs, float* acc) {
  const char* base = reinterpret_cast<const char*>(tables);
  for (int64_t o = 0; o < outputs; ++o) {
    Vec sum = load(acc + o * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j)
      sum += load(reinterpret_cast<const float*>(base + j * kTableEntries * kLanes * 4 + rows[o * kTables + j]));
    save(acc + o * kLanes, sum);
  }
}

void lookup(const float* tables, int64_t count, const uint16_t* rows, int64_t outputs, float* acc) {
  if (count == 4) return lookup_n<4>(tables, rows, outputs, acc);
  if (count == 3) return lookup_n<3>(tables, rows, outputs, acc);
  if (count == 2) return lookup_n<2>(tables, rows, outputs, acc);
  lookup_n<1>(tables, rows, outputs, acc);
}

void turn(const float* acc, float* c) {
  for (int64_t half = 0; half < kOutputs; half += 8, acc += 8 * kLanes, c += 8) {
    Vec row[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) row[i] = load(acc + i * kLanes);
    transpose8(row);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) save(c + i * kOutputs, row[i]);
  }
}
