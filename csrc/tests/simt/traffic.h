// The harness's counters held to the model that a kernel exports.
#pragma once

#include <string>

#include "../../common/cuda/traffic.h"
#include "../check.h"
#include "report.h"

namespace effkern::test::simt {

inline void expect_traffic(Report& report, const device::Traffic& model, const std::string& name) {
  const int64_t read = report.cost[Op::LoadGlobal].asked + report.cost[Op::AsyncCopy].asked;
  const int64_t written = report.cost[Op::StoreGlobal].asked;
  EXPECT(read == model.read, name, ": ", read, " bytes read, model ", model.read);
  EXPECT(written == model.written, name, ": ", written, " bytes written, model ", model.written);
}

}  // namespace effkern::test::simt
