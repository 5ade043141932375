#include "../common/cuda/launch.cuh"
#include "act_grad.cuh"
#include "depthwise_wgrad.cuh"
#include "fold.cuh"
#include "transpose.cuh"

namespace effkern::conv::gpu {
namespace {

// One block a piece, or as many as walk over all of them.
unsigned blocks_for(int64_t pieces) {
  constexpr int64_t kMost = 1 << 20;
  return static_cast<unsigned>(pieces < kMost ? pieces : kMost);
}

template <class T>
int64_t channel_groups(int32_t channels) {
  return (channels + device::kColumns<T> - 1) / device::kColumns<T>;
}

}  // namespace

template <class T>
void run(const ActGrad<T>& p, device::Stream stream) {
  const int64_t blocks = channel_groups<T>(p.channels) * p.slices.count;
  device::launch("act_grad", act_grad<T>, static_cast<unsigned>(blocks), device::kColumnThreads, device::kColumnShared,
                 stream, p);
}

template <class T>
void run(const Transpose<T>& p, device::Stream stream) {
  device::launch("transpose", transpose<T>, blocks_for(transpose_tiles(p)), kTransposeThreads, kTransposeShared, stream,
                 p);
}

template <class T>
void run(const Fold<T>& p, device::Stream stream) {
  device::launch("fold", fold<T>, blocks_for((p.elements + kFoldThreads - 1) / kFoldThreads), kFoldThreads, 0, stream,
                 p);
}

void run(const FoldSums& p, device::Stream stream) {
  device::launch("fold_sums", fold_sums, blocks_for((p.size + kFoldThreads - 1) / kFoldThreads), kFoldThreads, 0,
                 stream, p);
}

template <class T>
void run_depthwise(const Wgrad<T>& p, device::Stream stream) {
  const int64_t taps = int64_t{p.kernel.h} * p.kernel.w;
  const int64_t blocks = channel_groups<T>(p.groups) * ((taps + kTapsAtOnce - 1) / kTapsAtOnce) * p.slices.count;
  EFFKERN_CHECK_VALUE(blocks <= INT32_MAX, "depthwise_wgrad: the kernel has too many taps: ", taps);
  device::launch("depthwise_wgrad", depthwise_wgrad<T>, static_cast<unsigned>(blocks), device::kColumnThreads,
                 device::kColumnShared, stream, p);
}

#define EFFKERN_INSTANCES(T)                                \
  template void run(const ActGrad<T>& p, device::Stream);   \
  template void run(const Transpose<T>& p, device::Stream); \
  template void run(const Fold<T>& p, device::Stream);      \
  template void run_depthwise(const Wgrad<T>& p, device::Stream);
EFFKERN_INSTANCES(device::F16)
EFFKERN_INSTANCES(device::BF16)
EFFKERN_INSTANCES(float)
#undef EFFKERN_INSTANCES

}  // namespace effkern::conv::gpu
