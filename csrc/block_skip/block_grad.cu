#include "../common/cuda/launch.cuh"
#include "block_grad.cuh"

namespace effkern::block_skip {

template <class T>
void run(const BlockGrad<T>& p, device::Stream stream) {
  const int64_t blocks = int64_t{device::column_groups<T>(p.channels)} * p.pieces * p.samples;
  EFFKERN_CHECK_VALUE(blocks <= INT32_MAX, "block_grad: the batch is too large: ", blocks, " pieces");
  if (blocks > 0)
    device::launch("block_grad", block_grad<T>, static_cast<unsigned>(blocks), device::kColumnThreads,
                   device::kColumnShared, stream, p);
}

template void run(const BlockGrad<device::F16>& p, device::Stream);
template void run(const BlockGrad<device::BF16>& p, device::Stream);
template void run(const BlockGrad<float>& p, device::Stream);

}  // namespace effkern::block_skip
