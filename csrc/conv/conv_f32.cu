#include "conv_launch.cuh"

namespace effkern::conv::gpu {

void run(Problem<float> p, Math math, device::Stream stream) {
  if (math == Math::TF32)
    run_as<Math::TF32>(p, stream);
  else
    run_as<Math::F32>(p, stream);
}

}  // namespace effkern::conv::gpu
