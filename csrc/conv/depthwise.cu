#include "../common/cuda/launch.cuh"
#include "depthwise.cuh"

namespace effkern::conv::gpu {
namespace {

template <class T, bool kSliding>
void launch(const DepthwiseProblem<T>& p, device::Stream stream) {
  const int64_t tiles = depthwise_tiles(p);
  EFFKERN_CHECK_VALUE(tiles <= INT32_MAX, "depthwise: x must have fewer than 2^31 tiles of output, got ", tiles);
  const int shared = static_cast<int>(depthwise_shared(p));
  const unsigned resident = device::resident_blocks("depthwise", depthwise<T, kSliding>, kDepthwiseThreads, shared);
  const unsigned grid = depthwise_grid(p, resident);
  device::launch("depthwise", depthwise<T, kSliding>, grid, kDepthwiseThreads, shared, stream, p,
                 static_cast<int32_t>(tiles));
}

template <class T>
void run_as(const DepthwiseProblem<T>& p, device::Stream stream) {
  if (p.kernel.w == 3 && p.stride.w == 1 && p.dilation.w == 1)
    launch<T, true>(p, stream);
  else
    launch<T, false>(p, stream);
}

}  // namespace

void run(const DepthwiseProblem<device::F16>& p, device::Stream stream) { run_as(p, stream); }
void run(const DepthwiseProblem<device::BF16>& p, device::Stream stream) { run_as(p, stream); }
void run(const DepthwiseProblem<float>& p, device::Stream stream) { run_as(p, stream); }

}  // namespace effkern::conv::gpu
