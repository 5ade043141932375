// Steps done one after the other by threads that come late, or not at all.
#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../common/parallel.h"
#include "check.h"

namespace effkern::test {
namespace {

using Loop = void (*)(int64_t, int64_t, int64_t, const std::function<void(int64_t, int64_t)>&);

void serially(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(begin, end);
}
void in_turn(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  for (int64_t i = end; i-- > begin;) body(i, i + 1);
}
void at_once(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back([&body, i] { body(i, i + 1); });
  for (std::thread& thread : threads) thread.join();
}
// The last thread begins when the others are well under way.
void one_late(int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i)
    threads.emplace_back([&body, i, last = i + 1 == end] {
      if (last) std::this_thread::sleep_for(std::chrono::microseconds(200));
      body(i, i + 1);
    });
  for (std::thread& thread : threads) thread.join();
}
int64_t one() { return 1; }

constexpr Loop kLoops[] = {serially, in_turn, at_once, one_late};

// A line of numbers that every step replaces by sums of neighbours. The memory is plain: a step that begins too early
// reads what is not there yet, and is a race.
class Waves {
 public:
  Waves(int64_t steps, int64_t size) : lines_(static_cast<size_t>(steps + 1), std::vector<int64_t>(size, -1)) {
    for (int64_t i = 0; i < size; ++i) lines_[0][i] = i;
    calls_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(steps));
    for (int64_t s = 0; s < steps; ++s)
      // Some steps have fewer units than threads, or none.
      steps_.push_back({s % 7 == 3 ? s % 2 : size / (1 + s % 5), [this, s](int64_t b, int64_t e) { run(s, b, e); }});
  }
  void go(int64_t threads) { parallel_steps(steps_, threads); }
  const std::vector<int64_t>& result() const { return lines_.back(); }
  bool each_once() const {
    for (size_t s = 0; s < steps_.size(); ++s)
      if (calls_[s].load() != steps_[s].units) return false;
    return true;
  }

 private:
  void run(int64_t s, int64_t begin, int64_t end) {
    const std::vector<int64_t>& from = lines_[s];
    std::vector<int64_t>& to = lines_[s + 1];
    const auto size = static_cast<int64_t>(from.size()), units = steps_[s].units;
    for (int64_t i = size * begin / units; i < size * end / units; ++i)
      to[i] = (from[i] * 3 + from[(i + size / 2) % size] + from[(i + 1) % size]) % 1000003;
    calls_[s] += end - begin;
  }

  std::vector<std::vector<int64_t>> lines_;
  std::vector<std::atomic<int64_t>> calls_;
  std::vector<Step> steps_;
};

struct Pool {
  explicit Pool(Loop loop) { set_parallel(loop, one); }
  ~Pool() { set_parallel(serially, one); }
};

}  // namespace

TEST(steps_do_each_unit_once_and_in_order_whoever_comes) {
  for (const Loop loop : kLoops) {
    const Pool pool(loop);
    for (int trial = 0; trial < 20; ++trial)
      for (const int64_t threads : {1, 2, 3, 6}) {
        Waves waves(40, 30 + trial), alone(40, 30 + trial);
        alone.go(1);
        waves.go(threads);
        EXPECT(waves.each_once(), "threads ", threads);
        EXPECT(waves.result() == alone.result(), "threads ", threads);
      }
  }
}

TEST(a_thread_that_loses_its_core_holds_up_only_what_it_has_begun) {
  const Pool pool(at_once);
  std::atomic<int64_t> by_others{0};
  std::atomic<bool> asleep{false};
  const std::vector<Step> steps = {{16, [&](int64_t begin, int64_t end) {
                                      if (begin == 0) {
                                        asleep = true;
                                        // It wakes when the rest of its share is done, which nobody else would do if
                                        // they only waited.
                                        for (int wait = 0; wait < 10000 && by_others < 14; ++wait)
                                          std::this_thread::sleep_for(std::chrono::milliseconds(1));
                                      } else {
                                        while (!asleep) std::this_thread::yield();
                                        by_others += end - begin;
                                      }
                                    }}};
  parallel_steps(steps, 2);
  EXPECT(by_others == 14, by_others.load());
}

TEST(an_exception_ends_the_steps_on_all_threads) {
  for (const Loop loop : kLoops)
    for (const int64_t threads : {1, 2, 4}) {
      const Pool pool(loop);
      std::atomic<int64_t> later{0};
      const std::vector<Step> steps = {{8, [](int64_t, int64_t) {}},
                                       {8, [](int64_t, int64_t) { throw std::runtime_error("in the middle"); }},
                                       {8, [&](int64_t, int64_t) { ++later; }}};
      std::string what;
      try {
        parallel_steps(steps, threads);
      } catch (const std::runtime_error& error) {
        what = error.what();
      }
      EXPECT(what == "in the middle", what);
      EXPECT(later == 0, later.load());
    }
}

}  // namespace effkern::test
