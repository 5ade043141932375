#include "wgrad_launch.cuh"

namespace effkern::conv::gpu {

void run(const Wgrad<device::F16>& p, device::Stream stream) { run_wgrad<Math::F16>(p, stream); }

}  // namespace effkern::conv::gpu
