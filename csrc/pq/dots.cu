#include "../common/cuda/launch.cuh"
#include "dots.cuh"

namespace effkern::pq {
namespace {

template <class T, int kPer, int kM>
void launch(const Dots<T>& p, device::Stream stream) {
  const int shared = static_cast<int>(shared_of(p));
  const int64_t items = dots_items(p), tiles = (p.rows + kDotsRows - 1) / kDotsRows;
  EFFKERN_CHECK_VALUE(items <= INT32_MAX, "pq_linear: x must have fewer rows, got ", p.rows);
  const unsigned resident = device::resident_blocks("dots", dots<T, kPer, kM>, kDotsThreads, shared);
  device::launch("dots", dots<T, kPer, kM>, items < resident ? static_cast<unsigned>(items) : resident, kDotsThreads,
                 shared, stream, p, static_cast<int32_t>(items / tiles), static_cast<int32_t>(items));
}

}  // namespace

void run(const Dots<float>& p, device::Stream stream) {
  if (p.rows == 1)
    launch<float, 4, 1>(p, stream);
  else
    launch<float, 4, kDotsRows>(p, stream);
}

}  // namespace effkern::pq
