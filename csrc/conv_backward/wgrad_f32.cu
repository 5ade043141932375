#include "wgrad_launch.cuh"

namespace effkern::conv::gpu {

void run(const Wgrad<float>& p, Math math, device::Stream stream) {
  if (math == Math::TF32)
    run_wgrad<Math::TF32>(p, stream);
  else
    run_wgrad<Math::F32>(p, stream);
}

}  // namespace effkern::conv::gpu
