#include "launch.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <set>

#include "block.h"

namespace effkern::test::simt {
namespace {

class Grid;
Grid* grid = nullptr;
uint64_t launches = 0;

// Unwinds the stack of the thread at fault; the others are left where they are.
struct Stop {};

// Lanes of a warp that passed one line for the same time: one instruction.
struct WarpAccess {
  Op op;
  Site site;
  size_t bytes = 0;                                 // a lane
  int64_t asked = 0;                                // by all lanes
  std::vector<std::pair<int, uint64_t>> addresses;  // lane, and the address of each word or part of one
};

class Grid {
 public:
  Grid(const Launch& launch, const std::function<void()>& kernel)
      : launch_(launch), kernel_(kernel), rng_(launch.seed) {
    kind_ = static_cast<Schedule>(launch.seed % kSchedules);
    order_.resize(launch.grid);
    std::iota(order_.begin(), order_.end(), 0u);
    if (kind_ == Schedule::Reverse)
      std::reverse(order_.begin(), order_.end());
    else if (kind_ != Schedule::Forward)
      std::shuffle(order_.begin(), order_.end(), rng_);
    const size_t slots = static_cast<size_t>(launch.resident) * static_cast<size_t>(launch.threads);
    by_slot_.assign(slots, nullptr);
    runnable_.assign((slots + 63) / 64, 0);
  }

  Report run() {
    std::vector<std::unique_ptr<Block>> blocks(static_cast<size_t>(launch_.resident));
    size_t next = 0;
    while (report_.ok()) {
      int active = 0;
      for (size_t b = 0; b < blocks.size(); ++b) {
        if ((!blocks[b] || blocks[b]->live == 0) && next < order_.size()) begin(blocks[b], b, order_[next++]);
        active += blocks[b] && blocks[b]->live > 0;
      }
      if (active == 0) break;
      Thread* thread = pick();
      if (thread == nullptr) {
        deadlock(blocks);
        break;
      }
      self = thread;
      ++report_.switches;
      Fiber::change(host_, thread->fiber);
      self = nullptr;
    }
    self = nullptr;
    if (launch_.counters)
      for (auto& [key, access] : accesses_) tally(access);
    return std::move(report_);
  }

  // Called on a fiber: lets someone else run. `again`: this thread stays among those that can.
  void yield(bool again) {
    Thread* me = self;
    if (!again) set(me->slot, false);
    Thread* next = pick();
    if (next == me) return;
    if (++report_.switches > launch_.limit) fail(Fault::Limit, "after " + std::to_string(launch_.limit) + " switches");
    self = next;
    Fiber::change(me->fiber, next != nullptr ? next->fiber : host_);
    self = me;
  }

  void wake(Thread* thread) {
    thread->waiting = nullptr;
    set(thread->slot, true);
  }

  [[noreturn]] void fail(Fault kind, const std::string& what) {
    report_.fault = kind;
    report_.what = std::string(name(kind)) + ": " + what + ", seed " + std::to_string(launch_.seed) + ", block " +
                   std::to_string(self->block->index) + " thread " + std::to_string(self->id);
    throw Stop{};
  }

  // The life of a thread.
  void live() {
    try {
      kernel_();
      exit();
    } catch (const Stop&) {
    }
    Thread* me = self;
    Thread* next = report_.ok() && me->block->live > 0 ? pick() : nullptr;
    if (next != nullptr) ++report_.switches;
    self = next;
    Fiber::change(me->fiber, next != nullptr ? next->fiber : host_, true);
  }

  void exit() {
    Thread* me = self;
    size_t pending = me->open.size();
    for (const auto& group : me->copies) pending += group.size();
    if (pending != 0) fail(Fault::Leak, std::to_string(pending) + " asynchronous copies not waited for at the end");
    me->exited = true;
    Block& block = *me->block;
    --block.live;
    set(me->slot, false);
    for (const Collective& open : block.open[static_cast<size_t>(me->id / 32)])
      if ((open.mask >> me->lane() & 1) != 0)
        fail(Fault::Divergence, "a lane named in the mask at " + place(open.site) + " ended");
    release_if_complete(block);
  }

  // The block's own barrier opens when every live thread waits at it, and threads that end count as gone.
  void release_if_complete(Block& block) {
    Barrier& barrier = block.barriers[0];
    if (!barrier.waiting.empty() && static_cast<int>(barrier.waiting.size()) == block.live) release(barrier);
  }

  void release(Barrier& barrier) {
    std::vector<Thread*> all;
    all.swap(barrier.waiting);
    order(all);
    for (Thread* thread : all) wake(thread);
  }

  // Everything these threads did happens before everything they will do.
  static void order(const std::vector<Thread*>& threads) {
    auto clock = std::make_shared<Clock>(*threads.front()->known);
    std::set<const Clock*> merged{threads.front()->known.get()};
    for (Thread* thread : threads)
      if (merged.insert(thread->known.get()).second)
        for (size_t i = 0; i < clock->size(); ++i) (*clock)[i] = std::max((*clock)[i], (*thread->known)[i]);
    for (Thread* thread : threads) {
      (*clock)[static_cast<size_t>(thread->id)] = thread->epoch++;
    }
    for (Thread* thread : threads) thread->known = clock;
  }

  void count(Op op, const Site& site, uint64_t address, size_t bytes) {
    if (!launch_.counters) return;
    const uint32_t time = self->seen[{id(site), op}]++;
    WarpAccess& access = accesses_[{self->block->index, self->id / 32, id(site), op, time}];
    access.op = op, access.site = site;
    access.bytes = std::max(access.bytes, bytes), access.asked += static_cast<int64_t>(bytes);
    for (size_t at = 0; at < bytes; at += 4) access.addresses.emplace_back(self->lane(), address + at);
  }

  const Launch& launch() const { return launch_; }
  bool preempts() { return kind_ == Schedule::Preempted && rng_() % 4 == 0; }
  Report& report() { return report_; }

 private:
  // A block that ended gives its fibers to the next one.
  void begin(std::unique_ptr<Block>& block, size_t resident, unsigned index) {
    const size_t threads = static_cast<size_t>(launch_.threads);
    if (!block) {
      block = std::make_unique<Block>();
      for (size_t t = 0; t < threads; ++t) block->threads.push_back(std::make_unique<Thread>());
    }
    block->index = index;
    block->live = launch_.threads;
    block->barriers.clear();
    block->open.assign(threads / 32, {});
    block->shared = std::make_unique<Memory>("shared", launch_.shared, kReadable | kWritable, launch_.granule);
    const auto nothing = std::make_shared<const Clock>(threads, 0);
    std::vector<size_t> rank(threads);
    std::iota(rank.begin(), rank.end(), size_t{0});
    ranks(rank);
    for (size_t t = 0; t < threads; ++t) {
      Thread& thread = *block->threads[t];
      thread.block = block.get();
      thread.id = static_cast<int>(t);
      thread.slot = resident * threads + rank[t];
      thread.epoch = 1;
      thread.known = nothing;
      thread.exited = false;
      thread.waiting = nullptr;
      thread.copies.clear();
      thread.open.clear();
      thread.seen.clear();
      by_slot_[thread.slot] = &thread;
      set(thread.slot, true);
      thread.fiber.start([] { grid->live(); });
    }
  }

  // The place of each thread among those of its block; strict schedules take the first that can run.
  void ranks(std::vector<size_t>& rank) {
    const size_t threads = rank.size();
    std::vector<size_t> warps(threads / 32);
    std::iota(warps.begin(), warps.end(), size_t{0});
    switch (kind_) {
      case Schedule::Reverse:
        std::reverse(rank.begin(), rank.end());
        break;
      case Schedule::LanesReversed:
        for (size_t t = 0; t < threads; ++t) rank[t] = t / 32 * 32 + 31 - t % 32;
        break;
      case Schedule::WarpAhead:
        std::shuffle(warps.begin(), warps.end(), rng_);
        for (size_t t = 0; t < threads; ++t) rank[t] = warps[t / 32] * 32 + t % 32;
        break;
      case Schedule::Priorities:
        std::shuffle(rank.begin(), rank.end(), rng_);
        break;
      default:
        break;
    }
  }

  void set(size_t slot, bool on) {
    const uint64_t bit = uint64_t{1} << slot % 64;
    runnable_[slot / 64] = on ? runnable_[slot / 64] | bit : runnable_[slot / 64] & ~bit;
  }

  // The first slot that can run, from a place the schedule chooses on, around the end.
  Thread* pick() {
    const bool random = kind_ == Schedule::Random || kind_ == Schedule::Preempted;
    size_t start = random ? rng_() % by_slot_.size() : 0;
    if (kind_ == Schedule::WarpsMixed) start = rng_() % (by_slot_.size() / 32) * 32;
    const size_t words = runnable_.size();
    for (size_t i = 0; i <= words; ++i) {
      const size_t word = (start / 64 + i) % words;
      uint64_t bits = runnable_[word];
      if (i == 0) bits &= ~uint64_t{0} << start % 64;
      if (bits != 0) return by_slot_[word * 64 + static_cast<size_t>(std::countr_zero(bits))];
    }
    return nullptr;
  }

  void deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
    std::map<std::string, int> places;
    for (const auto& block : blocks)
      if (block)
        for (const auto& thread : block->threads)
          if (thread->waiting != nullptr) ++places[std::string(thread->waiting) + " at " + place(thread->where)];
    report_.fault = Fault::Deadlock;
    report_.what = "deadlock, seed " + std::to_string(launch_.seed) + ":";
    for (const auto& [text, threads] : places)
      report_.what += " " + std::to_string(threads) + " threads in " + text + ";";
  }

  void tally(WarpAccess& access) {
    if (access.addresses.empty()) return;
    const size_t unit = std::min<size_t>(4, access.bytes);
    std::stable_sort(access.addresses.begin(), access.addresses.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    std::set<uint64_t> units, sectors;
    for (const auto& [lane, address] : access.addresses) units.insert(address / unit), sectors.insert(address / 32);
    Cost cost{1, static_cast<int64_t>(units.size() * unit), 0, 0, static_cast<int64_t>(access.bytes)};
    if (access.op == Op::LoadGlobal || access.op == Op::StoreGlobal || access.op == Op::AsyncCopy) {
      cost.passes = static_cast<int64_t>(sectors.size());
      cost.least = (cost.bytes + 31) / 32;
    } else {
      // 16-byte accesses go eight lanes at a time, 8-byte ones sixteen, smaller ones the whole warp: 32 words a phase.
      for (size_t from = 0; from < access.addresses.size(); from += 32) {
        std::map<uint64_t, std::set<uint64_t>> banks;
        size_t most = 0, distinct = 0;
        for (size_t i = from; i < std::min(from + 32, access.addresses.size()); ++i) {
          const uint64_t word = access.addresses[i].second / 4;
          distinct += banks[word % 32].insert(word).second;
          most = std::max(most, banks[word % 32].size());
        }
        cost.passes += static_cast<int64_t>(most);
        cost.least += static_cast<int64_t>((distinct + 31) / 32);
      }
    }
    for (Cost* sum : {&report_.cost[access.op], &report_.lines[{access.op, access.site.line()}]}) {
      sum->instructions += 1;
      sum->bytes += cost.bytes;
      sum->passes += cost.passes;
      sum->least += cost.least;
      sum->bytes_per_lane = std::max(sum->bytes_per_lane, cost.bytes_per_lane);
      sum->asked += access.asked;
    }
  }

  const Launch launch_;
  const std::function<void()>& kernel_;
  std::mt19937 rng_;
  Schedule kind_;
  std::vector<unsigned> order_;
  std::vector<Thread*> by_slot_;
  std::vector<uint64_t> runnable_;
  std::map<std::tuple<unsigned, int, const void*, Op, uint32_t>, WarpAccess> accesses_;
  HostFiber host_;
  Report report_;
};

}  // namespace

Report run(const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads <= 0 || launch.threads > 1024 || launch.threads % 32 != 0 || launch.resident < 1 ||
      self != nullptr)
    return {Fault::Limit, "a launch has whole warps, at most 1024 threads, and starts on the host", {}, {}, 0, 0};
  ++launches;
  Grid state(launch, kernel);
  grid = &state;
  Report report = state.run();
  grid = nullptr;
  return report;
}

uint32_t Thread::global_id() const { return block->index * 1024 + static_cast<uint32_t>(id) + 1; }
uint64_t current_launch() { return launches; }
unsigned grid_size() { return grid->launch().grid; }
void fault(Fault kind, const std::string& what) { grid->fail(kind, what); }
const void* id(const Site& site) { return std::bit_cast<const void*>(site); }

std::string place(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash != nullptr ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

void maybe_preempt() {
  if (grid->preempts()) grid->yield(true);
}
void count(Op op, const Site& site, uint64_t address, size_t bytes) { grid->count(op, site, address, bytes); }
void count_mma() { ++grid->report().mma; }

void barrier(int id, int expected, const Site& site) {
  Thread& me = *self;
  Block& block = *me.block;
  Barrier& barrier = block.barriers[id];
  if (barrier.waiting.empty()) {
    barrier.site = site;
    barrier.expected = expected;
  } else if (simt::id(barrier.site) != simt::id(site) || barrier.expected != expected) {
    fault(Fault::Divergence,
          "barrier " + std::to_string(id) + " waited for at " + place(barrier.site) + " and at " + place(site));
  }
  barrier.waiting.push_back(&me);
  me.waiting = "a barrier";
  me.where = site;
  if (id == 0)
    grid->release_if_complete(block);
  else if (static_cast<int>(barrier.waiting.size()) == expected)
    grid->release(barrier);
  grid->yield(me.waiting == nullptr);
}

void collective(uint32_t mask, const Site& site, void* mine, bool orders_memory,
                void (*all)(const std::array<void*, 32>& lanes, uint32_t mask)) {
  Thread& me = *self;
  const uint32_t bit = 1u << me.lane();
  if ((mask & bit) == 0) fault(Fault::Divergence, "the lane is not in its own mask at " + place(site));
  const size_t warp = static_cast<size_t>(me.id / 32);
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) != 0 && me.block->threads[warp * 32 + static_cast<size_t>(lane)]->exited)
      fault(Fault::Divergence, "lane " + std::to_string(lane) + " of the mask has ended, at " + place(site));
  std::vector<Collective>& open = me.block->open[warp];
  size_t which = open.size();
  for (size_t i = 0; i < open.size(); ++i) {
    if ((open[i].mask & mask) == 0) continue;
    if (open[i].mask != mask || id(open[i].site) != id(site))
      fault(Fault::Divergence, "lanes of one warp at " + place(open[i].site) + " and at " + place(site));
    which = i;
  }
  if (which == open.size()) open.push_back({mask, 0, site, {}});
  open[which].arrived |= bit;
  open[which].lanes[static_cast<size_t>(me.lane())] = mine;
  me.waiting = "a warp operation";
  me.where = site;
  if (open[which].arrived == mask) {
    const Collective complete = open[which];
    open.erase(open.begin() + static_cast<int64_t>(which));
    std::vector<Thread*> lanes;
    for (size_t lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1) != 0) lanes.push_back(me.block->threads[warp * 32 + lane].get());
    all(complete.lanes, mask);
    if (orders_memory) Grid::order(lanes);
    for (Thread* lane : lanes) grid->wake(lane);
  }
  grid->yield(me.waiting == nullptr);
}

void async_issue(int64_t to, Memory* source, int64_t from, size_t bytes, const Site& site) {
  Thread& me = *self;
  if (bytes > 16) fault(Fault::OutOfBounds, "an asynchronous copy of more than 16 bytes at " + place(site));
  if (source != nullptr) source->probe(from, bytes, 16, site);
  me.block->shared->issue(to, site);
  me.open.push_back({to, source, from, bytes, site});
}

void async_commit() {
  self->copies.push_back(std::move(self->open));
  self->open.clear();
}

void async_wait(size_t left) {
  Thread& me = *self;
  while (me.copies.size() > left) {
    for (const Copy& copy : me.copies.front())
      me.block->shared->land(copy.to, copy.source, copy.from, copy.bytes, copy.site);
    me.copies.erase(me.copies.begin());
  }
}

}  // namespace effkern::test::simt
