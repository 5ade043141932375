#include "conv_launch.cuh"

namespace effkern::conv::gpu {

void run(Problem<device::BF16> p, device::Stream stream) { run_as<Math::BF16>(p, stream); }

}  // namespace effkern::conv::gpu
