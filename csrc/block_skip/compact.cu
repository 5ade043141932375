#include "../common/cuda/launch.cuh"
#include "compact.cuh"

namespace effkern::block_skip {
namespace {

template <class Bits>
void launch(const Compaction& c, Bits magnitude, device::Stream stream) {
  device::launch("compact", compact<Bits>, static_cast<unsigned>(c.columns), kCompactThreads, kCompactShared, stream,
                 c.keep.template as<const Bits>(), magnitude, c.n, c.row_stride, c.column_stride, c.idx, c.count,
                 c.rest);
}

}  // namespace

void run(const Compaction& c, device::Stream stream) {
  if (c.columns == 0) return;
  switch (c.size) {
    case 1:
      return launch<uint8_t>(c, 0xff, stream);
    case 2:
      return launch<uint16_t>(c, c.signed_entries ? 0x7fff : 0xffff, stream);
    default:
      return launch<uint32_t>(c, c.signed_entries ? 0x7fffffff : 0xffffffff, stream);
  }
}

}  // namespace effkern::block_skip
