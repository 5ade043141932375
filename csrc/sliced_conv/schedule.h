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

// One launch of one block.
void run(const Schedule& schedule, device::Stream stream);

}  // namespace effkern::sliced_conv
