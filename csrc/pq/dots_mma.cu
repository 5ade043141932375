#include "../common/cuda/launch.cuh"
#include "dots_mma.cuh"

namespace effkern::pq {
namespace {

template <class T, int kPer, int kTiles, int kEights = 1>
void launch(const Dots<T>& p, device::Stream stream) {
  constexpr auto kernel = dots_mma<T, kPer, kTiles, kEights>;
  const int shared = mma_shared(p);
  const int64_t items = dots_items(p), tiles = mma_row_tiles(p);
  EFFKERN_CHECK_VALUE(items <= INT32_MAX, "pq_linear: x must have fewer rows, got ", p.rows);
  const unsigned resident = device::resident_blocks("dots_mma", kernel, kMmaThreads, shared);
  device::launch("dots_mma", kernel, items < resident ? static_cast<unsigned>(items) : resident, kMmaThreads, shared,
                 stream, p, static_cast<int32_t>(items / tiles), static_cast<int32_t>(items));
}

template <class T>
void run_as(const Dots<T>& p, device::Stream stream) {
  const bool whole = detail::chunk_bytes(p) == 16, one = p.tiles == 1;
  if (p.eights > 1) return whole ? launch<T, 8, 2, kMmaEights>(p, stream) : launch<T, 4, 2, kMmaEights>(p, stream);
  if (whole && one) return launch<T, 8, 1>(p, stream);
  if (whole) return launch<T, 8, 2>(p, stream);
  if (one) return launch<T, 4, 1>(p, stream);
  launch<T, 4, 2>(p, stream);
}

}  // namespace

void run(const Dots<device::F16>& p, device::Stream stream) { run_as(p, stream); }
void run(const Dots<device::BF16>& p, device::Stream stream) { run_as(p, stream); }

}  // namespace effkern::pq
