// Winograd transforms, written once over the number of lanes. Included by ukernel_<isa>.cpp after ukernel_impl.h, in
// that set's namespace; includes nothing itself.
//
// F(4,3) uses the points 0, +-1/q, +-q, infinity with q = sqrt(2), which lose less than half of the digits that 0, +-1,
// +-2 lose; F(2,3) uses 0, +-1, infinity. Matrices after Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks" (2016), section 4. Stride 2 splits a line into its even and odd pixels, of which the even ones meet two
// taps and the odd ones one: 3 outputs take F(3,2) on the former and 3 products on the latter, 7 values instead of 9.
//
// A map whose side is no multiple of 4 ends in F(2,3) or F(3,3) on some of F(4,3)'s points: the same rows of G, so that
// no other weights are needed, 4 or 5 values a side instead of 6, and B^T scaled to fit (2 or 3 outputs of 0, +-1/q,
// [q,] infinity). 14 = 4 + 4 + 4 + 2 takes 22^2 products instead of 24^2, 7 = 4 + 3 11^2 instead of 12^2.
// Of stride 2 shorter tiles take 5 or 3 values a side instead of 7: 7 = 3 + 3 + 1 takes 17^2 products, not 21^2.
//
// Each F has: kOut outputs and kSide inputs of a tile's side; kRow, the rows of B^T, two at a time because two share
// their inputs, as numbers below kGrid, the rows of a whole tile; kWeightSide rows of G, in pairs kWeightRow. A row
// that does not exist is numbered past the end.

template <int kLanes>
struct F43 {
  using Vec = typename Lanes<kLanes>::Vec;
  static constexpr int kOut = 4, kSide = 6, kGrid = 6, kWeightSide = 6;
  static constexpr int kPairs = 3, kRow[3][2] = {{1, 2}, {3, 4}, {0, 5}};
  static constexpr int kWeightPairs = 3, kWeightRow[3][2] = {{1, 2}, {3, 4}, {0, 5}};
  static constexpr int kWeightOf[6] = {0, 1, 2, 3, 4, 5};       // the row of G that a row of B^T is multiplied with
  static constexpr int kTapLine[6] = {-1, -1, -1, -1, -1, -1};  // two are, but packed transforms hold them too
  static constexpr float kQ = 1.41421356237309504880f;

  // Rows kRow[pair] of B^T d.
  template <int pair>
  static void input(const Vec* d, Vec* out) {
    if constexpr (pair == 0) {
      const Vec a = d[4] - 2.0f * d[2], b = d[1] - 0.5f * d[3];
      out[0] = a - kQ * b;
      out[1] = a + kQ * b;
    } else if constexpr (pair == 1) {
      const Vec a = d[4] - 0.5f * d[2], b = d[3] - 0.5f * d[1];
      out[0] = a + kQ * b;
      out[1] = a - kQ * b;
    } else {
      out[0] = d[0] + d[4] - 2.5f * d[2];
      out[1] = d[1] + d[5] - 2.5f * d[3];
    }
  }

  // Rows kWeightRow[pair] of G times (g0, g1, g2).
  template <int pair>
  static void weight(const Vec* g, Vec* u) {
    if constexpr (pair == 0) {
      const Vec s = g[0] * (2.0f / 3) + g[2] * (1.0f / 3);
      u[0] = (-kQ / 3) * g[1] - s;
      u[1] = (kQ / 3) * g[1] - s;
    } else if constexpr (pair == 1) {
      const Vec s = g[0] * (1.0f / 6) + g[2] * (1.0f / 3);
      u[0] = (kQ / 6) * g[1] + s;
      u[1] = (-kQ / 6) * g[1] + s;
    } else {
      u[0] = g[0];
      u[1] = g[2];
    }
  }

  static void output(const Vec* m, int64_t step, Vec* y) {
    const Vec s1 = m[step] + m[2 * step], t1 = m[step] - m[2 * step];
    const Vec s2 = m[3 * step] + m[4 * step], t2 = m[3 * step] - m[4 * step];
    y[0] = m[0] + s1 + s2;
    y[1] = kQ * (0.5f * t1 + t2);
    y[2] = 0.5f * s1 + 2.0f * s2;
    y[3] = kQ * (0.25f * t1 + 2.0f * t2) + m[5 * step];
  }
};

// F(2,3) on the points 0, +-1/q, infinity of F(4,3).
template <int kLanes>
struct F43Two {
  using Vec = typename Lanes<kLanes>::Vec;
  static constexpr int kOut = 2, kSide = 4, kGrid = 6;
  static constexpr int kPairs = 2, kRow[2][2] = {{1, 2}, {0, 5}};
  static constexpr float kQ = F43<kLanes>::kQ;

  template <int pair>
  static void input(const Vec* d, Vec* out) {
    if constexpr (pair == 0) {
      const Vec a = -1.5f * d[2], b = (0.75f * kQ) * d[1];
      out[0] = a - b;
      out[1] = a + b;
    } else {
      out[0] = d[0] - 2.0f * d[2];
      out[1] = d[3] - 0.5f * d[1];
    }
  }

  static void output(const Vec* m, int64_t step, Vec* y) {
    y[0] = m[0] + m[step] + m[2 * step];
    y[1] = (0.5f * kQ) * (m[step] - m[2 * step]) + m[5 * step];
  }
};

// F(3,3) on the points 0, +-1/q, q, infinity of F(4,3).
template <int kLanes>
struct F43Three {
  using Vec = typename Lanes<kLanes>::Vec;
  static constexpr int kOut = 3, kSide = 5, kGrid = 6;
  static constexpr int kPairs = 3, kRow[3][2] = {{1, 2}, {0, 5}, {3, 6}};
  static constexpr float kQ = F43<kLanes>::kQ;

  template <int pair>
  static void input(const Vec* d, Vec* out) {
    if constexpr (pair == 0) {
      out[0] = (1.5f * kQ) * (d[3] - d[1]) - 1.5f * d[2];
      out[1] = (0.5f * kQ) * (d[3] + d[1]) - 1.5f * d[2];
    } else if constexpr (pair == 1) {
      const Vec a = kQ * (d[3] - 0.5f * d[1]);
      out[0] = d[0] - 2.0f * d[2] + a;
      out[1] = d[4] - 0.5f * d[2] - a;
    } else {
      out[0] = out[1] = (2.0f * kQ) * (d[3] - 0.5f * d[1]);
    }
  }

  static void output(const Vec* m, int64_t step, Vec* y) {
    const Vec s = m[step] + m[2 * step], t = m[step] - m[2 * step];
    y[0] = m[0] + s + m[3 * step];
    y[1] = kQ * (0.5f * t + m[3 * step]);
    y[2] = 0.5f * s + 2.0f * m[3 * step] + m[5 * step];
  }
};

template <int kLanes>
struct F23 {
  using Vec = typename Lanes<kLanes>::Vec;
  static constexpr int kOut = 2, kSide = 4, kGrid = 4, kWeightSide = 4;
  static constexpr int kPairs = 2, kRow[2][2] = {{0, 3}, {1, 2}};
  static constexpr int kWeightPairs = 2, kWeightRow[2][2] = {{0, 3}, {1, 2}};
  static constexpr int kWeightOf[4] = {0, 1, 2, 3};
  static constexpr int kTapLine[4] = {0, -1, -1, 2};

  template <int pair>
  static void input(const Vec* d, Vec* out) {
    if constexpr (pair == 0) {
      out[0] = d[0] - d[2];
      out[1] = d[1] - d[3];
    } else {
      out[0] = d[1] + d[2];
      out[1] = d[2] - d[1];
    }
  }

  template <int pair>
  static void weight(const Vec* g, Vec* u) {
    if constexpr (pair == 0) {
      u[0] = g[0];
      u[1] = g[2];
    } else {
      const Vec s = 0.5f * (g[0] + g[2]);
      u[0] = s + 0.5f * g[1];
      u[1] = s - 0.5f * g[1];
    }
  }

  static void output(const Vec* m, int64_t step, Vec* y) {
    y[0] = m[0] + m[step] + m[2 * step];
    y[1] = m[step] - m[2 * step] - m[3 * step];
  }
};

// Stride 2.
template <int kLanes>
struct F33 {
  using Vec = typename Lanes<kLanes>::Vec;
  static constexpr int kOut = 3, kSide = 7, kGrid = 7, kWeightSide = 5;
  static constexpr int kPairs = 4, kRow[4][2] = {{0, 3}, {1, 2}, {4, 5}, {6, 7}};
  static constexpr int kWeightPairs = 3, kWeightRow[3][2] = {{0, 3}, {1, 2}, {4, 5}};
  static constexpr int kWeightOf[7] = {0, 1, 2, 3, 4, 4, 4};
  static constexpr int kTapLine[5] = {0, -1, -1, 2, 1};

  template <int pair>
  static void input(const Vec* d, Vec* out) {
    if constexpr (pair == 0) {
      out[0] = d[0] - d[4];
      out[1] = d[2] - d[6];
    } else if constexpr (pair == 1) {
      out[0] = d[2] + d[4];
      out[1] = d[4] - d[2];
    } else if constexpr (pair == 2) {
      out[0] = d[1];
      out[1] = d[3];
    } else {
      out[0] = out[1] = d[5];
    }
  }

  template <int pair>
  static void weight(const Vec* g, Vec* u) {
    if constexpr (pair == 0) {
      u[0] = g[0];
      u[1] = g[2];
    } else if constexpr (pair == 1) {
      u[0] = 0.5f * (g[0] + g[2]);
      u[1] = 0.5f * (g[0] - g[2]);
    } else {
      u[0] = u[1] = g[1];
    }
  }

  static void output(const Vec* m, int64_t step, Vec* y) {
    const Vec s = m[step] + m[2 * step];
    y[0] = m[0] + s + m[4 * step];
    y[1] = m[step] - m[2 * step] + m[5 * step];
    y[2] = s - m[3 * step] + m[6 * step];
  }
};

// 2 outputs of F33: F(2,2) on the points 0, 1, infinity of the even pixels and 2 products of the odd ones.
template <int kLanes>
struct F33Two {
  using Vec = typename Lanes<kLanes>::Vec;
  static constexpr int kOut = 2, kSide = 5, kGrid = 7;
  static constexpr int kPairs = 3, kRow[3][2] = {{0, 3}, {4, 5}, {1, 7}};

  template <int pair>
  static void input(const Vec* d, Vec* out) {
    if constexpr (pair == 0) {
      out[0] = d[0] - d[2];
      out[1] = d[2] - d[4];
    } else if constexpr (pair == 1) {
      out[0] = d[1];
      out[1] = d[3];
    } else {
      out[0] = out[1] = 2.0f * d[2];
    }
  }

  static void output(const Vec* m, int64_t step, Vec* y) {
    y[0] = m[0] + m[step] + m[4 * step];
    y[1] = m[step] - m[3 * step] + m[5 * step];
  }
};

// 1 output of F33: a product a tap.
template <int kLanes>
struct F33One {
  using Vec = typename Lanes<kLanes>::Vec;
  static constexpr int kOut = 1, kSide = 3, kGrid = 7;
  static constexpr int kPairs = 2, kRow[2][2] = {{0, 3}, {4, 7}};

  template <int pair>
  static void input(const Vec* d, Vec* out) {
    if constexpr (pair == 0) {
      out[0] = d[0];
      out[1] = d[2];
    } else {
      out[0] = out[1] = d[1];
    }
  }

  static void output(const Vec* m, int64_t step, Vec* y) { y[0] = m[0] + m[3 * step] + m[4 * step]; }
};

// Rows H::kRow[pair] of B^T d B for kLanes channels of one tile, with H's rows down and W's across; the pixels (i, j)
// lie at x[i * row + j * pixel].
template <int kLanes, class H, class W, int pair = 0>
inline void wino_input_lanes(const float* x, int64_t row, int64_t pixel, float* v, int64_t plane) {
  using S = Lanes<kLanes>;
  using Vec = typename S::Vec;
  if constexpr (pair < H::kPairs) {
    Vec t[2][W::kSide];
#pragma GCC unroll 8
    for (int j = 0; j < W::kSide; ++j) {
      Vec d[H::kSide], out[2];
#pragma GCC unroll 8
      for (int i = 0; i < H::kSide; ++i) d[i] = S::load(x + i * row + j * pixel);
      H::template input<pair>(d, out);
      t[0][j] = out[0];
      t[1][j] = out[1];
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      if (H::kRow[pair][r] >= H::kGrid) break;
      float* to = v + H::kRow[pair][r] * W::kGrid * plane;
      Vec out[8];
      W::template input<0>(t[r], out);
      W::template input<1>(t[r], out + 2);
      if constexpr (W::kPairs > 2) W::template input<2>(t[r], out + 4);
      if constexpr (W::kPairs > 3) W::template input<3>(t[r], out + 6);
#pragma GCC unroll 8
      for (int j = 0; j < W::kSide; ++j) S::save(to + W::kRow[j / 2][j % 2] * plane, out[j]);
    }
    wino_input_lanes<kLanes, H, W, pair + 1>(x, row, pixel, v, plane);
  }
}

// A tile over the border of the image, or the last few channels: through a padded copy, so that nothing outside is
// read.
template <int kLanes, class H, class W>
void wino_input_padded(const InputTile& t, int64_t c, int64_t channels, float* v, int64_t plane) {
  using S = Lanes<kLanes>;
  alignas(64) float copy[H::kSide * W::kSide * kLanes], result[H::kGrid * W::kGrid * kLanes];
  for (int i = 0; i < H::kSide; ++i)
    for (int j = 0; j < W::kSide; ++j) {
      float* to = copy + (i * W::kSide + j) * kLanes;
      const float* from = t.x + i * t.row_pitch + j * t.pixel_pitch + c;
      if (i < t.y0 || i >= t.y1 || j < t.x0 || j >= t.x1) {
        S::save(to, typename S::Vec{});
      } else if (channels == kLanes) {
        S::save(to, S::load(from));
      } else {
        for (int64_t l = 0; l < kLanes; ++l) to[l] = l < channels ? from[l] : 0.0f;
      }
    }
  if (channels == kLanes) return wino_input_lanes<kLanes, H, W>(copy, W::kSide * kLanes, kLanes, v + c, plane);
  wino_input_lanes<kLanes, H, W>(copy, W::kSide * kLanes, kLanes, result, kLanes);
  for (int i = 0; i < H::kSide; ++i)
    for (int j = 0; j < W::kSide; ++j) {
      const int value = H::kRow[i / 2][i % 2] * W::kGrid + W::kRow[j / 2][j % 2];
      for (int64_t l = 0; l < channels; ++l) v[value * plane + c + l] = result[value * kLanes + l];
    }
}

// One tile of the input, all channels: v[(i * grid + j) * plane + channel] = (B^T d B)[i][j].
template <int kLanes, class H, class W>
void wino_input(const InputTile& t, int64_t channels, float* v, int64_t plane) {
  const bool inside = t.y0 == 0 && t.x0 == 0 && t.y1 == H::kSide && t.x1 == W::kSide;
  int64_t c = 0;
  if (inside)
    for (; c + kLanes <= channels; c += kLanes)
      wino_input_lanes<kLanes, H, W>(t.x + c, t.row_pitch, t.pixel_pitch, v + c, plane);
  for (; c < channels; c += kLanes)
    wino_input_padded<kLanes, H, W>(t, c, channels - c < kLanes ? channels - c : kLanes, v, plane);
}

// Rows kWeightRow[pair] of the transformed weights of one panel: u[(r * weight_side + j) * plane + k * 16 + lane] =
// (G g G^T)[kWeightRow[pair][r]][j] for k < channels, but for those that are a tap.
template <int kLanes, template <int> class F, int pair>
void wino_weight_pair(const float* g, int64_t tap_stride, int64_t channels, float* u, int64_t plane) {
  using S = Lanes<kLanes>;
  using Vec = typename S::Vec;
  using T = F<kLanes>;
  for (int64_t k = 0; k < channels * 16; k += kLanes) {
    Vec h[2][3];
#pragma GCC unroll 3
    for (int c = 0; c < 3; ++c) {
      Vec column[3], out[2];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) column[i] = S::load(g + (i * 3 + c) * tap_stride + k);
      T::template weight<pair>(column, out);
      h[0][c] = out[0];
      h[1][c] = out[1];
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      if (T::kWeightRow[pair][r] == T::kWeightSide) break;
      Vec out[6];
      T::template weight<0>(h[r], out);
      T::template weight<1>(h[r], out + 2);
      if constexpr (T::kWeightPairs == 3) T::template weight<2>(h[r], out + 4);
#pragma GCC unroll 8
      for (int j = 0; j < T::kWeightSide; ++j) {
        const int row = T::kWeightRow[pair][r], column = T::kWeightRow[j / 2][j % 2];
        if (T::kTapLine[row] < 0 || T::kTapLine[column] < 0)
          S::save(u + (r * T::kWeightSide + column) * plane + k, out[j]);
      }
    }
  }
}

template <int kLanes, template <int> class F>
void wino_weight(int64_t pair, const float* g, int64_t tap_stride, int64_t channels, float* u, int64_t plane) {
  if (pair == 0) return wino_weight_pair<kLanes, F, 0>(g, tap_stride, channels, u, plane);
  if (pair == 1) return wino_weight_pair<kLanes, F, 1>(g, tap_stride, channels, u, plane);
  if constexpr (F<kLanes>::kWeightPairs == 3) wino_weight_pair<kLanes, F, 2>(g, tap_stride, channels, u, plane);
}

// One tile of one panel: c[(i * out + j) * 16 + lane] = (A^T m A)[i][j], out being that of W. Values that the tile does
// not have are loaded by nothing: the compiler drops what no output needs.
template <int kLanes, class H, class W>
void wino_output(const float* m, int64_t plane, float* c) {
  using S = Lanes<kLanes>;
  using Vec = typename S::Vec;
  for (int lane = 0; lane < 16; lane += kLanes) {
    Vec rows[H::kGrid * W::kOut];
#pragma GCC unroll 8
    for (int i = 0; i < H::kGrid; ++i) {
      Vec in[W::kGrid];
#pragma GCC unroll 8
      for (int j = 0; j < W::kGrid; ++j) in[j] = S::load(m + (i * W::kGrid + j) * plane + lane);
      W::output(in, 1, rows + i * W::kOut);
    }
#pragma GCC unroll 8
    for (int j = 0; j < W::kOut; ++j) {
      Vec out[H::kOut];
      H::output(rows + j, W::kOut, out);
#pragma GCC unroll 8
      for (int i = 0; i < H::kOut; ++i) S::save(c + (i * W::kOut + j) * 16 + lane, out[i]);
    }
  }
}

template <class F>
constexpr WinogradPiece wino_piece() {
  WinogradPiece piece{F::kOut, F::kSide, {}};
  for (int i = 0; i < F::kSide; ++i) piece.has[F::kRow[i / 2][i % 2]] = true;
  return piece;
}

// The table of F, whose maps end in the first of Short and Longer that does the outputs left over.
template <int kLanes, template <int> class F, class Short = F<kLanes>, class Longer = F<kLanes>>
constexpr WinogradKernels winograd() {
  using T = F<kLanes>;
  WinogradKernels k{};
  k.out = T::kOut;
  k.side = T::kSide;
  k.weight_side = T::kWeightSide;
  k.pairs = T::kWeightPairs;
  k.weight_row = T::kWeightRow;
  k.weight_of = T::kWeightOf;
  k.tap_line = T::kTapLine;
  k.piece[0] = wino_piece<T>();
  k.piece[1] = wino_piece<Short>();
  k.piece[2] = wino_piece<Longer>();
  k.weight = wino_weight<kLanes, F>;
  k.input[0][0] = wino_input<kLanes, T, T>;
  k.input[0][1] = wino_input<kLanes, T, Short>;
  k.input[0][2] = wino_input<kLanes, T, Longer>;
  k.input[1][0] = wino_input<kLanes, Short, T>;
  k.input[1][1] = wino_input<kLanes, Short, Short>;
  k.input[1][2] = wino_input<kLanes, Short, Longer>;
  k.input[2][0] = wino_input<kLanes, Longer, T>;
  k.input[2][1] = wino_input<kLanes, Longer, Short>;
  k.input[2][2] = wino_input<kLanes, Longer, Longer>;
  k.output[0][0] = wino_output<kLanes, T, T>;
  k.output[0][1] = wino_output<kLanes, T, Short>;
  k.output[0][2] = wino_output<kLanes, T, Longer>;
  k.output[1][0] = wino_output<kLanes, Short, T>;
  k.output[1][1] = wino_output<kLanes, Short, Short>;
  k.output[1][2] = wino_output<kLanes, Short, Longer>;
  k.output[2][0] = wino_output<kLanes, Longer, T>;
  k.output[2][1] = wino_output<kLanes, Longer, Short>;
  k.output[2][2] = wino_output<kLanes, Longer, Longer>;
  return k;
}

template <int kLanes>
constexpr WinogradKernels winograd43() {
  return winograd<kLanes, F43, F43Two<kLanes>, F43Three<kLanes>>();
}

template <int kLanes>
constexpr WinogradKernels winograd33() {
  return winograd<kLanes, F33, F33One<kLanes>, F33Two<kLanes>>();
}
