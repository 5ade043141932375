#include "../common/cuda/launch.cuh"
#include "schedule.cuh"

namespace effkern::sliced_conv {

void run(const Schedule& s, device::Stream stream) {
  device::launch("schedule", schedule, 1, schedule_threads(s.samples), kScheduleShared, stream, s);
}

}  // namespace effkern::sliced_conv
