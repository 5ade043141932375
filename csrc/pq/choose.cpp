#include "choose.h"

namespace effkern::pq {
namespace {

// Nanoseconds, one core at 3.7 GHz (Zen 4); only their ratios matter, and AVX2 and AVX-512 measure alike.
constexpr double kFma = 0.0175;   // a multiply-add in the engine's tiles or in those of decode_fma
constexpr double kDecode = 0.12;  // a weight decoded into a panel
constexpr double kOffset = 0.13;  // a code read by decode_fma, whatever the rows it serves
constexpr double kReduce = 1.2;   // partial sums of an output added up
constexpr double kLookup = 0.4;   // a code added up for 8 rows, the share of listing it included
constexpr double kBlock = 8, kPanelPixels = 384, kDotRows = 96;

double ceil_div(double a, double b) { return static_cast<double>(static_cast<int64_t>((a + b - 1) / b)); }

}  // namespace

bool fits_rows(const conv::Problem& p) {
  return p.kh == 1 && p.kw == 1 && p.pad[0] == 0 && p.pad[1] == 0 && p.groups == 1;
}

bool fits_lut(const conv::Problem& p, const CodedMatrix& m) {
  return fits_rows(p) && m.stages == 1 && m.entries <= kTableEntries;
}

int64_t left_to_dots(int64_t pixels) {
  constexpr int64_t kMost = 3;
  const int64_t left = pixels % kLanes;
  return pixels >= kLanes && left <= kMost ? left : 0;
}

Algo choose(const conv::Problem& p, const CodedMatrix& m) {
  if (!fits_rows(p)) return Algo::Panel;
  const bool vectors = m.d == 4 || m.d % 8 == 0;
  const double pixels = static_cast<double>(p.y.h) * p.y.w, weights = static_cast<double>(p.c_in) * p.c_out;
  const double codes = static_cast<double>(m.positions) * m.rows;
  const double arithmetic = pixels * weights * kFma;
  const double panel = arithmetic + weights * kDecode * ceil_div(pixels, kPanelPixels);
  const double dots = arithmetic + codes * kOffset * ceil_div(pixels, kDotRows) + pixels * m.rows * kReduce;
  Algo best = vectors && dots < panel ? Algo::DecodeFma : Algo::Panel;
  if (fits_lut(p, m)) {
    const double left = static_cast<double>(left_to_dots(p.y.h * p.y.w)), blocks = ceil_div(pixels - left, kBlock);
    const double fill = kBlock * m.entries * static_cast<double>(p.c_in) * kFma;
    const double lut = blocks * (fill + codes * kLookup) + (left > 0 ? codes * (kOffset + 0.25 * left) : 0);
    if (lut < (best == Algo::Panel ? panel : dots)) best = Algo::Lut;
  }
  return best;
}

}  // namespace effkern::pq
