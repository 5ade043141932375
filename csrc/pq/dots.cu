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

template <class T, int kPer>
void run_in_chunks(const Dots<T>& p, device::Stream stream) {
  if (p.rows == 1)
    launch<T, kPer, 1>(p, stream);
  else
    launch<T, kPer, kDotsRows>(p, stream);
}

template <class T>
void run_as(const Dots<T>& p, device::Stream stream) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  if constexpr (sizeof(T) == 2)
    if (detail::chunk_bytes(p) == 8) return run_in_chunks<T, kPer / 2>(p, stream);
  run_in_chunks<T, kPer>(p, stream);
}

}  // namespace

void run(const Dots<device::F16>& p, device::Stream stream) { run_as(p, stream); }
void run(const Dots<device::BF16>& p, device::Stream stream) { run_as(p, stream); }
void run(const Dots<float>& p, device::Stream stream) { run_as(p, stream); }

}  // namespace effkern::pq
