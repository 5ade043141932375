// The state of a launch: threads, their clocks, warps and blocks, and who may run.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "launch.h"
#include "memory.h"

namespace effkern::test::simt {

using Clock = std::vector<uint32_t>;             // the epoch of each thread of the block that is known to have ended
constexpr uint32_t kInFlightEpoch = UINT32_MAX;  // never known to have ended

struct Copy {
  int64_t to;
  Memory* source;
  int64_t from;
  size_t bytes;
  Site site;
};

struct Block;

struct Thread {
  Block* block = nullptr;
  int id = 0;
  size_t slot = 0;  // its bit in the set of those that can run
  uint32_t epoch = 1;
  std::shared_ptr<const Clock> known;
  bool exited = false;
  const char* waiting = nullptr;  // at what; `where` says from which line
  Site where;
  std::vector<std::vector<Copy>> copies;                // committed groups, oldest first
  std::vector<Copy> open;                               // issued, not committed
  std::map<std::pair<const void*, Op>, uint32_t> seen;  // how often it passed a line, for the counters
  Fiber fiber;

  int lane() const { return id % 32; }
  uint32_t global_id() const;
};

struct Barrier {
  std::vector<Thread*> waiting;
  Site site;
  int expected = 0;  // named barriers; the block's own expects all live threads
};

struct Collective {
  uint32_t mask = 0, arrived = 0;
  Site site;
  std::array<void*, 32> lanes{};
};

struct Block {
  unsigned index = 0;
  int live = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::map<int, Barrier> barriers;
  std::vector<std::vector<Collective>> open;  // of each warp
  std::unique_ptr<Memory> shared;
};

// The thread that runs now; null on the host.
inline Thread* self = nullptr;

[[noreturn]] void fault(Fault kind, const std::string& what);  // ends the launch
const void* id(const Site& site);                              // one address for each place in the source
std::string place(const Site& site);

uint64_t current_launch();  // counts up, so that memories know when their clocks are stale
unsigned grid_size();
void maybe_preempt();
void count(Op op, const Site& site, uint64_t address, size_t bytes);
void count_mma();

void barrier(int id, int expected, const Site& site);
// All lanes of the mask meet; the last to come calls `all` with what each brought, then all go on. Orders no memory
// unless asked to.
void collective(uint32_t mask, const Site& site, void* mine, bool orders_memory,
                void (*all)(const std::array<void*, 32>& lanes, uint32_t mask));

void async_issue(int64_t to, Memory* source, int64_t from, size_t bytes, const Site& site);
void async_commit();
void async_wait(size_t left);

}  // namespace effkern::test::simt
