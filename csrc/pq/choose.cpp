#include "choose.h"

namespace effkern::pq {
namespace {

// Nanoseconds, one core at 3.7 GHz (Zen 4), between what AVX2 and AVX-512 measure there; only their ratios matter.
constexpr double kFma = 0.0175;      // a multiply-add in the engine's tiles or in those of decode_fma
constexpr double kShortFma = 0.025;  // the same with d = 4, where a vector is put together from two entries
constexpr double kDecode = 0.11;     // a weight decoded into a panel
constexpr double kOffset = 0.12;     // a code read by decode_fma, whatever the rows it serves
constexpr double kReduce = 1.2;      // an output's partial sums added up
constexpr double kFill = 0.0205;     // a multiply-add of a table, with d = 4 or 8; other d take kFillAny
constexpr double kFillAny = 0.08;
constexpr double kLookup = 0.4;                   // a code added up for 8 rows, the share of listing it included
constexpr double kTurnIn = 1.0, kTurnOut = 0.35;  // a number of x, of y, turned for or from 8 rows side by side
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
  const bool vectors = m.d == 4 || m.d % 8 == 0, tables = m.d == 4 || m.d == 8;
  const double pixels = static_cast<double>(p.y.h) * p.y.w, outputs = static_cast<double>(p.c_out);
  const double inputs = static_cast<double>(p.c_in), weights = inputs * outputs;
  const double codes = static_cast<double>(m.positions) * outputs;
  const double panel = pixels * weights * kFma + weights * kDecode * ceil_div(pixels, kPanelPixels);
  const double dots = pixels * weights * (m.d == 4 ? kShortFma : kFma) + codes * kOffset * ceil_div(pixels, kDotRows) +
                      pixels * outputs * kReduce;
  const Algo best = vectors && dots < panel ? Algo::DecodeFma : Algo::Panel;
  if (!fits_lut(p, m)) return best;
  const double left = static_cast<double>(left_to_dots(p.y.h * p.y.w)), entries = static_cast<double>(m.entries);
  const double fill = kBlock * entries * inputs * (tables ? kFill : kFillAny);
  const double lut = ceil_div(pixels - left, kBlock) * (fill + codes * kLookup) + pixels * inputs * kTurnIn +
                     pixels * outputs * kTurnOut + (left > 0 ? codes * (kOffset + 0.25 * left) : 0);
  return lut < (best == Algo::Panel ? panel : dots) ? Algo::Lut : best;
}

}  // namespace effkern::pq
