#include "../common/cuda/launch.cuh"
#include "stage.cuh"

namespace effkern::block_skip {
namespace {

template <Math kMath, class T, int kC>
void launch(const Stage<T>& p, device::Stream stream) {
  const auto shared = static_cast<int>(stage_shared(kC, sizeof(T), p.h, p.w));
  device::launch("stage", stage<kMath, T, kC>, static_cast<unsigned>(p.samples), stage_threads(kC), shared, stream, p);
}

template <Math kMath, class T>
void run_as(const Stage<T>& p, device::Stream stream) {
  if (p.samples == 0) return;
  if (p.channels == 16)
    launch<kMath, T, 16>(p, stream);
  else if (p.channels == 32)
    launch<kMath, T, 32>(p, stream);
  else
    launch<kMath, T, 64>(p, stream);
}

}  // namespace

void run(const Stage<device::F16>& p, device::Stream stream) { run_as<Math::F16>(p, stream); }
void run(const Stage<device::BF16>& p, device::Stream stream) { run_as<Math::BF16>(p, stream); }
void run(const Stage<float>& p, Math math, device::Stream stream) {
  if (math == Math::TF32)
    run_as<Math::TF32>(p, stream);
  else
    run_as<Math::F32>(p, stream);
}
int64_t most_stage_shared() { return device::most_shared("stage"); }

}  // namespace effkern::block_skip
