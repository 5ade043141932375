// 3x3 convolution by Winograd's minimal filtering: F(4x4, 3x3) and F(2x2, 3x3) for stride 1, F(3x3, 3x3) for stride 2.
// A panel is transformed when it is used, which costs as much as 3 tiles of arithmetic and reads a quarter of the
// memory that transformed weights take; where these are at hand they are read.
#pragma once

#include "plan.h"
#include "problem.h"
#include "ukernel.h"

namespace effkern::conv {

// Scratch of one thread, in bytes.
int64_t winograd_scratch_bytes(const Problem& problem, const Plan& plan, const Kernels& kernels);

// Does the plan's units [begin, end) on the calling thread.
void run_winograd(const Problem& problem, const Plan& plan, const Kernels& kernels, int64_t begin, int64_t end);

}  // namespace effkern::conv
