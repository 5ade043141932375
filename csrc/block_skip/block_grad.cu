#include "../common/cuda/pieces_launch.cuh"
#include "block_grad.cuh"

namespace effkern::block_skip {

template <class T>
void run(const BlockGrad<T>& p, device::Stream stream) {
  device::launch_pieces<T>("block_grad", block_grad<T>, p, stream);
}

template void run(const BlockGrad<device::F16>& p, device::Stream);
template void run(const BlockGrad<device::BF16>& p, device::Stream);
template void run(const BlockGrad<float>& p, device::Stream);

}  // namespace effkern::block_skip
