// The sorting of a ragged batch: any number of samples and classes, both widths of integers, any stride, values out of
// range, every schedule.
#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "../../sliced_conv/schedule.cuh"
#include "../check.h"
#include "launch.h"

namespace effkern::test::simt {
namespace {

using conv::gpu::Part;

std::mt19937& dice() {
  static std::mt19937 engine(6);
  return engine;
}

template <class T>
device::Global<T> global(Memory& memory) {
  return {reinterpret_cast<T*>(memory.data()), &memory};
}

template <class T>
T at(const Memory& memory, size_t i) {
  T value;
  std::memcpy(&value, memory.data() + i * sizeof(T), sizeof(T));
  return value;
}

// A list of integers in memory, with entries between them that no one may read.
class List {
 public:
  List(const char* name, const std::vector<int64_t>& values, bool wide, int64_t stride)
      : memory_(name, (values.size() * static_cast<size_t>(stride) + 1) * (wide ? 8 : 4), 0, 4),
        wide_(wide),
        stride_(stride) {
    const size_t size = wide ? 8 : 4;
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t offset = i * static_cast<size_t>(stride) * size;
      const int32_t narrow = static_cast<int32_t>(values[i]);
      std::memcpy(memory_.data() + offset, wide ? static_cast<const void*>(&values[i]) : &narrow, size);
      memory_.permit(offset, size, kReadable | kDefined);
    }
  }
  device::Indices indices() { return {global<const int32_t>(memory_), stride_ * (wide_ ? 2 : 1), wide_}; }

 private:
  Memory memory_;
  bool wide_;
  int64_t stride_;
};

int64_t held(int64_t value, int64_t most) { return std::clamp<int64_t>(value, 0, most); }

void sorts(const std::vector<int64_t>& c_in, const std::vector<int64_t>& c_out, bool wide, int64_t stride, int seeds) {
  const int32_t n = static_cast<int32_t>(c_in.size()), most_in = 48, most_out = 40, most_row = 2;
  List ins("c_in", c_in, wide, stride), outs("c_out", c_out, !wide, 1), rows("width_idx", c_out, wide, stride);
  const size_t bytes = static_cast<size_t>(n) * 4;
  Memory order("order", bytes, kWritable, 4), parts("parts", bytes * 4, kWritable, 4), count("count", 4, kWritable, 4),
      table("table", bytes, kWritable, 4);
  std::map<std::pair<int64_t, int64_t>, std::vector<int32_t>, std::greater<>> classes;
  for (int32_t i = 0; i < n; ++i)
    classes[{held(c_out[static_cast<size_t>(i)], most_out), held(c_in[static_cast<size_t>(i)], most_in)}].push_back(i);
  for (uint32_t seed = 0; seed < static_cast<uint32_t>(seeds); ++seed) {
    for (Memory* memory : {&order, &parts, &count, &table}) memory->poison();
    const Launch launch{.threads = sliced_conv::schedule_threads(n),
                        .shared = sliced_conv::kScheduleShared,
                        .seed = seed,
                        .granule = 4,
                        .counters = seed == 0};
    const sliced_conv::Schedule schedule{ins.indices(),
                                         outs.indices(),
                                         rows.indices(),
                                         n,
                                         most_in,
                                         most_out,
                                         most_row,
                                         global<int32_t>(order),
                                         global<Part>(parts),
                                         global<int32_t>(count),
                                         global<int32_t>(table)};
    Report report = run(launch, [&] { sliced_conv::schedule(schedule); });
    EXPECT(report.ok(), report.what);
    if (launch.counters) {
      const sliced_conv::ScheduleWork work = sliced_conv::schedule_work(schedule, static_cast<int64_t>(classes.size()));
      EXPECT(report.cost[Op::LoadGlobal].asked == work.bytes_widths, report.cost[Op::LoadGlobal].asked);
      EXPECT(report.cost[Op::StoreGlobal].asked == work.bytes_lists, report.cost[Op::StoreGlobal].asked);
    }
    EXPECT(at<int32_t>(count, 0) == static_cast<int32_t>(classes.size()), at<int32_t>(count, 0), " classes of ",
           classes.size());
    size_t part = 0;
    int32_t first = 0;
    for (const auto& [widths, members] : classes) {
      const Part p = at<Part>(parts, part++);
      EXPECT(p.c_out == widths.first && p.c_in == widths.second && p.first == first &&
                 p.count == static_cast<int32_t>(members.size()),
             "n ", n, " seed ", seed, " part ", part - 1, ": ", p.c_in, "x", p.c_out, " ", p.first, " ", p.count);
      for (const int32_t member : members) EXPECT(at<int32_t>(order, static_cast<size_t>(first++)) == member);
    }
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      EXPECT(at<int32_t>(table, i) == held(c_out[i], most_row));
      EXPECT(order.stores(i * 4) == 1);
    }
  }
}

}  // namespace

TEST(schedule_sorts_every_size) {
  for (const size_t n : {0, 1, 31, 32, 33, 255, 256, 257, 600}) {
    std::vector<int64_t> c_in(n), c_out(n);
    for (size_t i = 0; i < n; ++i) c_in[i] = 8 * (dice()() % 3), c_out[i] = 16 * (dice()() % 3);
    sorts(c_in, c_out, n % 2 == 0, 1 + static_cast<int64_t>(n % 3), kSchedules);
  }
}

TEST(schedule_sorts_more_than_a_block_has_threads_or_holds) {
  for (const size_t n : {1025, 2500, 4097}) {
    std::vector<int64_t> c_in(n), c_out(n);
    for (size_t i = 0; i < n; ++i) c_in[i] = 8 * (dice()() % 2), c_out[i] = 16 * (dice()() % 2);
    sorts(c_in, c_out, true, 1, 2);
  }
}

TEST(schedule_sorts_one_class_and_as_many_as_samples) {
  sorts(std::vector<int64_t>(40, 16), std::vector<int64_t>(40, 24), true, 1, kSchedules);
  std::vector<int64_t> all(41);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i * 7 % 41);
  sorts(all, all, false, 1, 3);
}

TEST(schedule_holds_widths_to_what_fits) {
  const std::vector<int64_t> any = {-1, 0, 1000, INT64_MAX, INT64_MIN, int64_t{1} << 32, 40, -5, INT32_MAX};
  sorts(any, {7, 7, 1000, -1, 3, INT32_MAX, 40, INT32_MIN, 0}, true, 1, 2);
  sorts({-1, 49, 48, INT32_MAX}, {3, 3, 3, 3}, false, 2, 2);
}

}  // namespace effkern::test::simt
