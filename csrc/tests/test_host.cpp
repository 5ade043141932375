// Host-side helpers on plain arrays: packing of codes.
#include <algorithm>

#include "../host/codes.h"
#include "check.h"
#include "oracle.h"

namespace effkern::test {

TEST(packed_codes_come_back) {
  for (int bits = 1; bits <= 32; ++bits) {
    for (const int64_t count : {0, 1, 7, 8, 9, 100}) {
      const Guarded bytes(static_cast<size_t>(host::packed_bytes(count, bits)));
      const Guarded back(static_cast<size_t>(count) * sizeof(int64_t));
      std::vector<int64_t> codes;
      for (int64_t i = 0; i < count; ++i) codes.push_back(draw(0, (int64_t{1} << bits) - 1));
      host::pack(codes.data(), count, bits, static_cast<uint8_t*>(bytes.data()));
      host::unpack(static_cast<const uint8_t*>(bytes.data()), count, bits, static_cast<int64_t*>(back.data()));
      EXPECT(std::equal(codes.begin(), codes.end(), static_cast<const int64_t*>(back.data())), bits, " bits");
    }
  }
}

}  // namespace effkern::test
