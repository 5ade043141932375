#include "decode.h"

#include <algorithm>
#include <cstring>

namespace effkern::pq {
namespace {

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int QuadIndex __attribute__((vector_size(16)));

Quad shuffle(Quad a, Quad b, QuadIndex which) {
#if defined(__clang__)
  Quad out;
  for (int i = 0; i < 4; ++i) out[i] = which[i] < 4 ? a[which[i]] : b[which[i] - 4];
  return out;
#else
  return __builtin_shuffle(a, b, which);
#endif
}

// Columns t .. t + 3 of four rows of the book as rows of a panel: a 4 x 4 transpose, one shuffle a number moved in
// place of two scalar moves.
void transpose(const float* const* rows, int64_t t, Quad* out) {
  Quad in[4];
  for (int i = 0; i < 4; ++i) in[i] = *reinterpret_cast<const Quad*>(rows[i] + t);
  const Quad low01 = shuffle(in[0], in[1], QuadIndex{0, 4, 1, 5}),
             high01 = shuffle(in[0], in[1], QuadIndex{2, 6, 3, 7});
  const Quad low23 = shuffle(in[2], in[3], QuadIndex{0, 4, 1, 5}),
             high23 = shuffle(in[2], in[3], QuadIndex{2, 6, 3, 7});
  out[0] = shuffle(low01, low23, QuadIndex{0, 1, 4, 5});
  out[1] = shuffle(low01, low23, QuadIndex{2, 3, 6, 7});
  out[2] = shuffle(high01, high23, QuadIndex{0, 1, 4, 5});
  out[3] = shuffle(high01, high23, QuadIndex{2, 3, 6, 7});
}

// Writes (or, for a later additive stage, adds) 16 book rows of `length` numbers into their places of a panel.
template <bool kAdd>
void place_rows(const float* const* rows, int64_t length, const int32_t* place, float* panel) {
  int64_t t = 0;
  for (; t + 4 <= length; t += 4) {
    for (int64_t lane = 0; lane < conv::kPanel; lane += 4) {
      Quad columns[4];
      transpose(rows + lane, t, columns);
      for (int i = 0; i < 4; ++i) {
        Quad* to = reinterpret_cast<Quad*>(panel + place[t + i] * conv::kPanel + lane);
        *to = kAdd ? *to + columns[i] : columns[i];
      }
    }
  }
  for (; t < length; ++t) {
    float* to = panel + place[t] * conv::kPanel;
    for (int64_t lane = 0; lane < conv::kPanel; ++lane) to[lane] = kAdd ? to[lane] + rows[lane][t] : rows[lane][t];
  }
}

}  // namespace

template <class Code>
void Decoder::entries_of(int64_t r, int64_t count, int64_t position, int64_t stage, const float** out) const {
  const int64_t pitch = m_.positions * m_.stages;
  const Code* codes = static_cast<const Code*>(m_.codes) + r * pitch + position * m_.stages + stage;
  const int64_t which = m_.books == 1 ? 0 : m_.book_per_position ? position : stage;
  const float* book = m_.book + which * m_.entries * m_.d;
  for (int64_t i = 0; i < count; ++i) {
    int64_t code = codes[i * pitch];
    if (static_cast<uint64_t>(code) >= static_cast<uint64_t>(m_.entries)) {  // negative ones wrap to large
      bad_.store(code, std::memory_order_relaxed);
      code = 0;
    }
    out[i] = book + code * m_.d;
  }
}

void Decoder::entries(int64_t r, int64_t count, int64_t position, int64_t stage, const float** out) const {
  switch (m_.type) {
    case CodeType::U8:
      return entries_of<uint8_t>(r, count, position, stage, out);
    case CodeType::I16:
      return entries_of<int16_t>(r, count, position, stage, out);
    case CodeType::U16:
      return entries_of<uint16_t>(r, count, position, stage, out);
    case CodeType::I32:
      return entries_of<int32_t>(r, count, position, stage, out);
  }
}

void Decoder::row(int64_t r, float* out) const {
  const float* entry = nullptr;
  for (int64_t j = 0; j < m_.positions; ++j, out += m_.d) {
    entries(r, 1, j, 0, &entry);
    std::memcpy(out, entry, static_cast<size_t>(m_.d) * sizeof(float));
    for (int64_t s = 1; s < m_.stages; ++s) {
      entries(r, 1, j, s, &entry);
      for (int64_t t = 0; t < m_.d; ++t) out[t] += entry[t];
    }
  }
}

CodedPanels::CodedPanels(const Decoder& decoder, int64_t groups, int64_t channels, int64_t taps)
    : Panels(channels * conv::kPanel),
      decoder_(decoder),
      group_rows_(decoder.matrix().rows / groups),
      columns_(channels * taps),
      place_(static_cast<size_t>(columns_)),
      zeros_(static_cast<size_t>(decoder.matrix().d)) {
  for (int64_t f = 0; f < columns_; ++f) place_[f] = static_cast<int32_t>(f % taps * channels + f / taps);
}

const float* CodedPanels::panel(int64_t group, int64_t p, float* scratch) const {
  const CodedMatrix& m = decoder_.matrix();
  const int64_t first = group * group_rows_ + p * conv::kPanel;
  const int64_t live = std::min(conv::kPanel, group_rows_ - p * conv::kPanel);
  const float* rows[conv::kPanel];
  std::fill(rows + live, rows + conv::kPanel, zeros_.data());
  for (int64_t j = 0; j < m.positions; ++j) {
    const int64_t begin = j * m.d, length = std::min(m.d, columns_ - begin);  // the last sub-vector may overhang
    const int32_t* place = place_.data() + begin;
    for (int64_t s = 0; s < m.stages; ++s) {
      decoder_.entries(first, live, j, s, rows);
      s == 0 ? place_rows<false>(rows, length, place, scratch) : place_rows<true>(rows, length, place, scratch);
    }
  }
  return scratch;
}

void decode_depthwise(const Decoder& decoder, int64_t taps, float* out) {
  const CodedMatrix& m = decoder.matrix();
  std::vector<float> row(static_cast<size_t>(m.width()));
  for (int64_t r = 0; r < m.rows; ++r) {
    decoder.row(r, row.data());
    for (int64_t t = 0; t < taps; ++t) out[t * m.rows + r] = row[t];
  }
}

}  // namespace effkern::pq
