#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace effkern {
namespace {

void serial(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(begin, end);
}
int64_t one() { return 1; }

ParallelFor the_loop = serial;
int64_t (*the_threads)() = one;

}  // namespace

void set_parallel(ParallelFor loop, int64_t (*threads)()) {
  the_loop = loop;
  the_threads = threads;
}

int64_t num_threads() { return the_threads(); }

void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (begin >= end) return;
  std::exception_ptr first;
  std::mutex lock;
  the_loop(begin, end, grain, [&](int64_t b, int64_t e) {
    try {
      body(b, e);
    } catch (...) {
      const std::lock_guard<std::mutex> hold(lock);
      if (!first) first = std::current_exception();
    }
  });
  if (first) std::rethrow_exception(first);
}

namespace {

// Looks at a counter before its thread is offered to others: some 20 us. Before it takes over what a thread that is
// about to come has not begun: some 2 us, more than such a thread needs to come.
constexpr int kSpins = 1000, kPatience = 100;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#endif
}

// What one thread has to do of one step, on a cache line of its own.
struct alignas(64) Share {
  std::atomic<bool> taken[kPieces] = {};
};

class Team {
 public:
  Team(std::span<const Step> steps, int64_t members)
      : steps_(steps),
        members_(members),
        shares_(steps.size() * static_cast<size_t>(members)),
        left_(steps.size()),
        at_(static_cast<size_t>(members)) {
    for (size_t s = 0; s < steps.size(); ++s) left_[s].value.store(pieces(s) * members, std::memory_order_relaxed);
    for (Counter& at : at_) at.value.store(-2, std::memory_order_relaxed);
  }

  void work_as(int64_t member) {
    for (size_t s = 0; s < steps_.size(); ++s) {
      at_[member].value.store(static_cast<int64_t>(s), std::memory_order_release);
      take(s, member);
      finish(s, member);
    }
  }

  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  int64_t pieces(size_t s) const { return std::clamp<int64_t>(steps_[s].units / members_ / 2, 1, steps_[s].pieces); }

  void take(size_t s, int64_t member) {
    for (int64_t piece = 0; piece < pieces(s); ++piece) try_piece(s, member, piece);
  }

  void try_piece(size_t s, int64_t member, int64_t piece) {
    std::atomic<bool>& taken = shares_[s * members_ + member].taken[piece];
    if (taken.load(std::memory_order_relaxed) || taken.exchange(true, std::memory_order_relaxed)) return;
    const int64_t all = pieces(s) * members_, index = member * pieces(s) + piece, units = steps_[s].units;
    const int64_t begin = units * index / all, end = units * (index + 1) / all;
    try {
      if (begin < end && !failed_.load(std::memory_order_relaxed)) steps_[s].run(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> hold(lock_);
      if (!first_) first_ = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);
    }
    left_[s].value.fetch_sub(1, std::memory_order_acq_rel);
  }

  // Waits until all of the step is done, and does what its owners leave lying.
  void finish(size_t s, int64_t member) {
    for (int spins = 0; left_[s].value.load(std::memory_order_acquire) > 0; ++spins) {
      // A thread that waits for this step to begin, or has begun it, does its share itself unless it lost its core.
      for (int64_t other = 1; other < members_; ++other) {
        const int64_t owner = (member + other) % members_;
        const bool comes = at_[owner].value.load(std::memory_order_relaxed) >= static_cast<int64_t>(s) - 1;
        if (!comes || spins >= kPatience)
          for (int64_t piece = pieces(s); piece-- > 0 && left_[s].value.load(std::memory_order_relaxed) > 0;)
            try_piece(s, owner, piece);
      }
      if (spins < kSpins)
        relax();
      else
        std::this_thread::yield();
    }
  }

  std::span<const Step> steps_;
  const int64_t members_;
  std::vector<Share> shares_;
  std::vector<Counter> left_;  // pieces of each step that are not done
  std::vector<Counter> at_;    // the step each member is at
  std::atomic<bool> failed_{false};
  std::mutex lock_;
  std::exception_ptr first_;
};

}  // namespace

void parallel_steps(std::span<const Step> steps, int64_t threads) {
  if (threads <= 1) {
    for (const Step& step : steps)
      if (step.units > 0) step.run(0, step.units);
    return;
  }
  Team team(steps, threads);
  // Whoever is given several members plays the first: the work of the others is taken over.
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t) { team.work_as(begin); });
  team.rethrow();
}

}  // namespace effkern
