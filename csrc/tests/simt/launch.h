// Runs a kernel on the CPU, a fiber a thread, under a schedule drawn from a seed.
//
// A fiber runs until a barrier or a warp operation stops it; who goes next is the schedule's choice. Seeds 0 to 7 draw
// one of each kind (Schedule), further seeds the same kinds with other random numbers. Limits: no weak memory between
// threads beyond happens-before, no timing, blocks of whole warps, one dimension.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>

#include "report.h"

namespace effkern::test::simt {

enum class Schedule {
  Random,         // any runnable thread
  WarpAhead,      // one warp as far as it gets, then the next, in random order
  Reverse,        // the highest thread that can run
  LanesReversed,  // warps in order, lanes from 31 down
  Priorities,     // a strict random order of all threads: the last one starves
  Preempted,      // any runnable thread, and a switch may come at every memory access
  Forward,        // the lowest thread that can run
  WarpsMixed,     // any runnable thread, lanes of a warp mostly together
};
constexpr int kSchedules = 8;

struct Launch {
  unsigned grid = 1;
  int threads = 32;
  size_t shared = 0;  // bytes of dynamic shared memory
  uint32_t seed = 0;
  int resident = 1;    // blocks that run interleaved
  size_t granule = 2;  // smallest access to shared memory
  bool counters = false;
  int64_t limit = 200'000'000;  // switches
};

Report run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace effkern::test::simt
