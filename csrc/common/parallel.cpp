#include "parallel.h"

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

}  // namespace effkern
