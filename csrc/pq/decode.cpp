#include "decode.h"

#include <algorithm>
#include <cstring>

namespace effkern::pq {
namespace {

int64_t load_code(const void* codes, CodeType type, int64_t i) {
  switch (type) {
    case CodeType::U8:
      return static_cast<const uint8_t*>(codes)[i];
    case CodeType::I16:
      return static_cast<const int16_t*>(codes)[i];
    case CodeType::U16:
      return static_cast<const uint16_t*>(codes)[i];
    default:
      return static_cast<const int32_t*>(codes)[i];
  }
}

// One weight column of a panel: the same weight of 16 outputs.
typedef float Column __attribute__((vector_size(conv::kPanel * sizeof(float)), aligned(4), may_alias));

}  // namespace

const float* Decoder::entry(int64_t r, int64_t position, int64_t stage) const {
  int64_t code = load_code(m_.codes, m_.type, (r * m_.positions + position) * m_.stages + stage);
  if (static_cast<uint64_t>(code) >= static_cast<uint64_t>(m_.entries)) {  // negative ones wrap to large
    bad_.store(code, std::memory_order_relaxed);
    code = 0;
  }
  const int64_t book = m_.books == 1 ? 0 : m_.book_per_position ? position : stage;
  return m_.book + (book * m_.entries + code) * m_.d;
}

void Decoder::row(int64_t r, float* out) const {
  for (int64_t j = 0; j < m_.positions; ++j, out += m_.d) {
    std::memcpy(out, entry(r, j, 0), static_cast<size_t>(m_.d) * sizeof(float));
    for (int64_t s = 1; s < m_.stages; ++s) {
      const float* add = entry(r, j, s);
      for (int64_t t = 0; t < m_.d; ++t) out[t] += add[t];
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
      for (int64_t lane = 0; lane < live; ++lane) rows[lane] = decoder_.entry(first + lane, j, s);
      for (int64_t t = 0; t < length; ++t) {
        Column column;
        for (int64_t lane = 0; lane < conv::kPanel; ++lane) column[lane] = rows[lane][t];
        Column* to = reinterpret_cast<Column*>(scratch + place[t] * conv::kPanel);
        *to = s == 0 ? column : *to + column;
      }
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
