// Codes of 1 to 32 bits in a byte string, least significant bit first, without gaps: what a saved layer holds.
#pragma once

#include <cstdint>

namespace effkern::host {

inline int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

// out has packed_bytes(count, bits) bytes; each code must be below 2^bits.
inline void pack(const int64_t* codes, int64_t count, int bits, uint8_t* out) {
  uint64_t pending = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    pending |= static_cast<uint64_t>(codes[i]) << filled;
    for (filled += bits; filled >= 8; filled -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
  }
  if (filled > 0) *out = static_cast<uint8_t>(pending);
}

// bytes has packed_bytes(count, bits) bytes.
inline void unpack(const uint8_t* bytes, int64_t count, int bits, int64_t* codes) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t pending = 0;
  int filled = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (; filled < bits; filled += 8) pending |= static_cast<uint64_t>(*bytes++) << filled;
    codes[i] = static_cast<int64_t>(pending & mask);
    pending >>= bits;
    filled -= bits;
  }
}

}  // namespace effkern::host
