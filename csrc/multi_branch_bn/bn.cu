#include "../common/cuda/launch.cuh"
#include "bn_backward.cuh"

namespace effkern::multi_branch_bn::gpu {
namespace {

template <class T>
unsigned blocks_of(const Maps<T>& maps) {
  return static_cast<unsigned>(device::column_groups<T>(maps.channels)) * static_cast<unsigned>(maps.slices.count);
}

unsigned blocks_of(int32_t channels) {
  return static_cast<unsigned>((channels + kFinishChannels - 1) / kFinishChannels);
}

}  // namespace

template <class T>
void run(const Statistics<T>& p, device::Stream stream) {
  device::launch("bn_statistics", bn_statistics<T>, blocks_of(p.maps) * static_cast<unsigned>(p.maps.count),
                 device::kColumnThreads, kStatisticsShared, stream, p);
}

void run(const Finish& p, device::Stream stream) {
  device::launch("bn_finish", bn_finish, blocks_of(p.channels), p.count * kTermThreads, kFinishShared, stream, p);
}

template <class T>
void run(const Apply<T>& p, device::Stream stream) {
  device::launch("bn_apply", bn_apply<T>, blocks_of(p.maps), device::kColumnThreads, 0, stream, p);
}

template <class T>
void run(const GradientSums<T>& p, device::Stream stream) {
  device::launch("bn_gradient_sums", bn_gradient_sums<T>, blocks_of(p.of.maps), device::kColumnThreads, kSumsShared<T>,
                 stream, p);
}

void run(const GradientFinish& p, device::Stream stream) {
  device::launch("bn_gradient_finish", bn_gradient_finish, blocks_of(p.channels), (1 + p.count) * kTermThreads,
                 kFinishShared, stream, p);
}

template <class T>
void run(const GradientApply<T>& p, device::Stream stream) {
  device::launch("bn_gradient_apply", bn_gradient_apply<T>, blocks_of(p.of.maps), device::kColumnThreads,
                 kGradientShared<T>, stream, p);
}

#define EFFKERN_INSTANCES(T)                                   \
  template void run(const Statistics<T>& p, device::Stream);   \
  template void run(const Apply<T>& p, device::Stream);        \
  template void run(const GradientSums<T>& p, device::Stream); \
  template void run(const GradientApply<T>& p, device::Stream);
EFFKERN_INSTANCES(device::F16)
EFFKERN_INSTANCES(device::BF16)
EFFKERN_INSTANCES(float)
#undef EFFKERN_INSTANCES

}  // namespace effkern::multi_branch_bn::gpu
