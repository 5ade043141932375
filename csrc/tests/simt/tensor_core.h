// mma.sync on the CPU, from the fragment layouts of the PTX manual: with g = lane / 4 and t = lane % 4,
//   16-bit m16n8k16: A register r, half i: row g + 8 * (r % 2), column 2t + i + 8 * (r / 2);
//                    B register r, half i: row 2t + i + 8r, column g;
//   tf32 m16n8k8:    A register r: row g + 8 * (r % 2), column t + 4 * (r / 2);  B register r: row t + 4r, column g;
//   C register r:    row g + 8 * (r / 2), column 2t + r % 2.
// Hardware does not round after each product. Two models bracket it: sums in fp32 in order, each rounded to nearest,
// and sums of eight exact products with the accumulator, cut off toward zero (`truncate`, the tests run both).
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../../common/half.h"

namespace effkern::test::simt {

inline bool truncate_products = false;

struct MmaLane {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

struct FormatF16 {
  static constexpr int kDepth = 16, kPerWord = 2;
  static float value(uint32_t word, int i) {
    static const std::vector<float> table = [] {
      std::vector<float> all(65536);
      for (uint32_t bits = 0; bits < all.size(); ++bits) all[bits] = f16_to_float(static_cast<uint16_t>(bits));
      return all;
    }();
    return table[word >> (16 * i) & 0xffffu];
  }
};
struct FormatBF16 {
  static constexpr int kDepth = 16, kPerWord = 2;
  static float value(uint32_t word, int i) { return bf16_to_float(static_cast<uint16_t>(word >> (16 * i))); }
};
struct FormatTF32 {
  static constexpr int kDepth = 8, kPerWord = 1;
  // The hardware does not look at the 13 low bits, so neither does this: a conversion left out shows as an error.
  static float value(uint32_t word, int) { return bits_to_float(word & 0xffffe000u); }
};

inline float cut_toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

template <class Format>
void multiply(const std::array<void*, 32>& lanes) {
  constexpr int kDepth = Format::kDepth, kHalf = kDepth / 2, kPerWord = Format::kPerWord;
  float a[16][kDepth], b[8][kDepth];
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<const MmaLane*>(lanes[static_cast<size_t>(l)]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < kPerWord; ++i) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][kPerWord * t + i + kHalf * (r / 2)] = Format::value(lane->a[r], i);
      for (int r = 0; r < 2; ++r) b[g][kPerWord * t + i + kHalf * r] = Format::value(lane->b[r], i);
    }
  }
  for (int l = 0; l < 32; ++l) {
    const auto* lane = static_cast<const MmaLane*>(lanes[static_cast<size_t>(l)]);
    for (int r = 0; r < 4; ++r) {
      const float *row = a[l / 4 + 8 * (r / 2)], *column = b[2 * (l % 4) + r % 2];
      float& c = lane->c[r];
      if (truncate_products) {
        for (int k = 0; k < kDepth; k += 8) {
          double sum = c;
          for (int i = k; i < k + 8; ++i) sum += static_cast<double>(row[i]) * static_cast<double>(column[i]);
          c = cut_toward_zero(sum);
        }
      } else {
        for (int k = 0; k < kDepth; ++k) c += row[k] * column[k];
      }
    }
  }
}

}  // namespace effkern::test::simt
