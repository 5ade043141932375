// A kernel under one schedule after the other, until one shows a fault or a wrong result.
#pragma once

#include <cstdint>
#include <string>

#include "../check.h"
#include "array.h"
#include "tensor_core.h"

namespace effkern::test::simt {

// `run(seed)` gives a report, `compare()` what is wrong with the result, or nothing. With `normal`, values that are
// not integers, the tensor core cuts its sums off at every other seed.
template <class Run, class Compare>
void holds_under_schedules(const std::string& name, bool normal, uint32_t first, int seeds, const Run& run,
                           const Compare& compare) {
  for (uint32_t seed = first; seed < first + static_cast<uint32_t>(seeds); ++seed) {
    truncate_products = normal && seed % 2 == 1;
    const Report report = run(seed);
    ++schedules_run();
    EXPECT(report.ok(), name, ": ", report.what);
    if (!report.ok()) break;
    const std::string wrong = compare();
    EXPECT(wrong.empty(), name, " seed ", seed, ": ", wrong);
    if (!wrong.empty()) break;
  }
  truncate_products = false;
}

}  // namespace effkern::test::simt
