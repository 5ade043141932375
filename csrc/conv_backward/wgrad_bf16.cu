#include "wgrad_launch.cuh"

namespace effkern::conv::gpu {

void run(const Wgrad<device::BF16>& p, device::Stream stream) { run_wgrad<Math::BF16>(p, stream); }

}  // namespace effkern::conv::gpu
