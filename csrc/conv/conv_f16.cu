#include "conv_launch.cuh"

namespace effkern::conv::gpu {

void run(Problem<device::F16> p, device::Stream stream) { run_as<Math::F16>(p, stream); }

}  // namespace effkern::conv::gpu
