#include "../common/cuda/pieces_launch.cuh"
#include "ragged_grad.cuh"

namespace effkern::sliced_conv {

template <class T>
void run(const RaggedGrad<T>& p, device::Stream stream) {
  device::launch_pieces<T>("ragged_grad", ragged_grad<T>, p, stream);
}

void run(const FoldTable& p, device::Stream stream) {
  constexpr int64_t kMost = 1 << 20;
  const int64_t blocks = (int64_t{p.rows} * p.columns + kFoldTableThreads - 1) / kFoldTableThreads;
  if (blocks > 0)
    device::launch("fold_table", fold_table, static_cast<unsigned>(blocks < kMost ? blocks : kMost), kFoldTableThreads,
                   0, stream, p);
}

template void run(const RaggedGrad<device::F16>& p, device::Stream);
template void run(const RaggedGrad<device::BF16>& p, device::Stream);
template void run(const RaggedGrad<float>& p, device::Stream);

}  // namespace effkern::sliced_conv
