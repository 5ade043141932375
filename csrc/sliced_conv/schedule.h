// What the sorting of a ragged batch on the device (schedule.cuh) is given.
#pragma once

#include "../common/cuda/indices.h"
#include "../common/cuda/stream.h"
#include "../conv/conv_gpu.h"

namespace effkern::sliced_conv {

using conv::gpu::Part;
using device::Global;
using device::Indices;

struct Schedule {
  Indices c_in, c_out, table;
  int32_t samples, most_in, most_out, most_row;
  Global<int32_t> order;       // [samples]
  Global<Part> parts;          // [samples]
  Global<int32_t> part_count;  // []
  Global<int32_t> table_row;   // [samples], null: not asked for
};

// Threads of the block: a sample each, and up to four where there are more.
constexpr int32_t kMostScheduleThreads = 1024, kHeldSamples = 4;
EFFKERN_BOTH int32_t schedule_threads(int32_t samples) {
  return samples < 32 ? 32 : samples < kMostScheduleThreads ? (samples + 31) / 32 * 32 : kMostScheduleThreads;
}

// Bytes that the kernel's instructions move: the widths once, or where they are too many to be held in registers once
// more than there are classes, of which `parts` came out.
struct ScheduleWork {
  int64_t bytes_widths, bytes_lists;
};
inline ScheduleWork schedule_work(const Schedule& s, int64_t parts) {
  const auto entry = [](const Indices& list) { return !list.words ? 0 : list.wide ? 8 : 4; };
  const int64_t rows = s.table_row ? int64_t{s.samples} : 0;
  const int64_t passes = s.samples <= kHeldSamples * kMostScheduleThreads ? 1 : parts + 1;
  return {passes * s.samples * (entry(s.c_in) + entry(s.c_out)) + rows * entry(s.table),
          (s.samples + rows + 1) * 4 + parts * static_cast<int64_t>(sizeof(Part))};
}

// One launch of one block.
void run(const Schedule& schedule, device::Stream stream);

}  // namespace effkern::sliced_conv
