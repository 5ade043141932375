#include "decode.h"

#include <algorithm>
#include <cstring>

namespace effkern::pq {
namespace {

// Positions whose offsets are worked out at a time: 4 KiB of them, next to 8 KiB of book in L1.
constexpr int64_t kBlock = 64;

int64_t code_size(CodeType type) { return type == CodeType::U8 ? 1 : type == CodeType::I32 ? 4 : 2; }

int64_t block_positions(const CodedMatrix& m) { return std::max<int64_t>(1, kBlock / m.stages); }

// A tap's plane of a panel is a power of two long where the channels are, and the taps of a channel would then fall
// into one set of the L1 cache: with 16 floats more they do not, and decoding is 2.4 times as fast.
int64_t padded_stride(int64_t channels, int64_t taps) { return (channels + (taps > 1 ? 1 : 0)) * conv::kPanel; }

}  // namespace

const void* Decoder::code_at(int64_t index) const {
  return static_cast<const char*>(m_.codes) + index * code_size(m_.type);
}

int64_t Decoder::code(int64_t index) const {
  return with_code(m_.type, [&]<class Code>() -> int64_t { return static_cast<const Code*>(m_.codes)[index]; });
}

// Looks for the code out of range that a kernel met among `count` numbers of each row, for the message.
void Decoder::find_bad(int64_t r, int64_t rows, int64_t flat, int64_t count) const {
  const int64_t pitch = m_.positions * m_.stages;
  for (int64_t i = r; i < r + rows; ++i)
    for (int64_t j = flat; j < flat + count; ++j) {
      const int64_t value = code(i * pitch + j);
      if (value < 0 || value >= m_.entries) bad_.store(value, std::memory_order_relaxed);
    }
}

void Decoder::offsets(int64_t r, int64_t rows, int64_t position, int64_t count, int64_t book_floats,
                      uint32_t* out) const {
  const int64_t pitch = m_.positions * m_.stages, flat = position * m_.stages, flats = count * m_.stages;
  const uint32_t last = static_cast<uint32_t>(m_.entries - 1);
  const bool good =
      k_.offsets(code_at(r * pitch + flat), m_.type, pitch, rows, flats, last, static_cast<uint32_t>(book_floats), out);
  if (!good) find_bad(r, rows, flat, flats);
  if (m_.books == 1) return;
  for (int64_t i = 0; i < flats; ++i) {
    const int64_t which = m_.book_per_position ? position + i : i % m_.stages;
    const uint32_t start = static_cast<uint32_t>(which * m_.entries * book_floats);
    for (int64_t lane = 0; lane < kOutputs; ++lane) out[i * kOutputs + lane] += start;
  }
}

void Decoder::table_rows(int64_t position, int64_t count, uint16_t* out, int64_t out_pitch) const {
  const uint32_t last = static_cast<uint32_t>(m_.entries - 1);
  if (!k_.table_rows(code_at(position), m_.type, m_.positions, m_.rows, count, last, out, out_pitch))
    find_bad(0, m_.rows, position, count);
}

template <class Code>
void Decoder::row_of(int64_t r, float* out) const {
  const Code* codes = static_cast<const Code*>(m_.codes) + r * m_.positions * m_.stages;
  const int64_t book_floats = m_.entries * m_.d;
  for (int64_t j = 0; j < m_.positions; ++j, out += m_.d) {
    for (int64_t s = 0; s < m_.stages; ++s, ++codes) {
      int64_t code = *codes;
      if (static_cast<uint64_t>(code) >= static_cast<uint64_t>(m_.entries)) {  // negative ones wrap to large
        bad_.store(code, std::memory_order_relaxed);
        code = 0;
      }
      const float* entry = m_.book + (m_.books == 1 ? 0 : m_.book_per_position ? j : s) * book_floats + code * m_.d;
      if (s == 0)
        std::memcpy(out, entry, static_cast<size_t>(m_.d) * sizeof(float));
      else
        for (int64_t t = 0; t < m_.d; ++t) out[t] += entry[t];
    }
  }
}

void Decoder::row(int64_t r, float* out) const {
  with_code(m_.type, [&]<class Code>() { row_of<Code>(r, out); });
}

void Decoder::prefetch(int64_t r) const {
  const int64_t bytes = m_.positions * m_.stages * code_size(m_.type);
  const char* codes = static_cast<const char*>(m_.codes) + r * bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + i);
}

CodedPanels::CodedPanels(const Decoder& decoder, int64_t groups, int64_t channels, int64_t taps)
    : Panels(padded_stride(channels, taps)),
      decoder_(decoder),
      group_rows_(decoder.matrix().rows / groups),
      channels_(channels),
      taps_(taps) {}

// The panel, a column for what the last sub-vector has too many, and a block of offsets.
int64_t CodedPanels::scratch_floats() const {
  const CodedMatrix& m = decoder_.matrix();
  return taps_ * tap_stride + kOutputs + block_positions(m) * m.stages * kOutputs;
}

const float* CodedPanels::panel(int64_t group, int64_t p, float* scratch) const {
  const CodedMatrix& m = decoder_.matrix();
  const int64_t first = group * group_rows_ + p * conv::kPanel;
  const int64_t live = std::min(conv::kPanel, group_rows_ - p * conv::kPanel);
  const int64_t columns = channels_ * taps_, whole = columns / m.d;  // whole sub-vectors
  float* const nowhere = scratch + taps_ * tap_stride;
  uint32_t* const offsets = reinterpret_cast<uint32_t*>(nowhere + kOutputs);
  // Where sub-vectors are whole kernels or runs of channels, their columns lie alike: a block is placed at once.
  const bool regular = m.d % taps_ == 0;
  const int64_t advance = m.d / taps_ * conv::kPanel, block = block_positions(m);
  constexpr int64_t kColumns = 64;
  float* to[kColumns];
  for (int64_t begin = 0; begin < m.positions; begin += block) {
    const int64_t count = std::min(block, m.positions - begin);
    decoder_.offsets(first, live, begin, count, m.d, offsets);
    for (int64_t i = 0; i < count;) {
      const int64_t together = regular && begin + i < whole ? std::min(count, whole - begin) - i : 1;
      for (int64_t t = 0; t < m.d; t += kColumns) {
        const int64_t length = std::min(kColumns, m.d - t);
        int64_t column = (begin + i) * m.d + t, channel = column / taps_, tap = column % taps_;
        for (int64_t c = 0; c < length; ++c, ++column) {
          to[c] = column < columns ? scratch + tap * tap_stride + channel * conv::kPanel : nowhere;
          if (++tap == taps_) tap = 0, ++channel;
        }
        decoder_.inner().panel(m.book + t, offsets + i * m.stages * kOutputs, together, m.stages, length, to, advance);
      }
      i += together;
    }
  }
  if (live < conv::kPanel)
    for (int64_t i = 0; i < taps_ * tap_stride; i += conv::kPanel)
      std::fill(scratch + i + live, scratch + i + conv::kPanel, 0.0f);
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
