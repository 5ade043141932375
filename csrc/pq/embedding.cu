#include "../common/cuda/launch.cuh"
#include "embedding.cuh"

namespace effkern::pq {
namespace {

template <class T, bool kWide>
void launch(const Lookup<T>& p, device::Stream stream) {
  const unsigned needed = (static_cast<unsigned>(p.bags) + kLookupWarps - 1) / kLookupWarps;
  const unsigned resident = device::resident_blocks("lookup", lookup<T, kWide>, kLookupThreads, 0);
  device::launch("lookup", lookup<T, kWide>, needed < resident ? needed : resident, kLookupThreads, 0, stream, p);
}

template <class T>
void run_as(const Lookup<T>& p, device::Stream stream) {
  if (p.wide)
    launch<T, true>(p, stream);
  else
    launch<T, false>(p, stream);
}

}  // namespace

void run(const Lookup<device::F16>& p, device::Stream stream) { run_as(p, stream); }
void run(const Lookup<device::BF16>& p, device::Stream stream) { run_as(p, stream); }
void run(const Lookup<float>& p, device::Stream stream) { run_as(p, stream); }

}  // namespace effkern::pq
