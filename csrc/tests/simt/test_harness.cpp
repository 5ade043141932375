// The harness itself: every fault it promises to find is found under every schedule, and the correct twin of each
// faulty kernel passes. Fragments are checked against a plain matrix product.
#include <cstring>
#include <numeric>

#include "../../common/cuda/device.cuh"
#include "../check.h"
#include "launch.h"

namespace effkern::test::simt {
namespace {

using namespace effkern::device;

// Runs the kernel under all schedules; every run must end with this fault.
template <class Kernel>
void ends_with(Fault fault, const char* label, Launch launch, Kernel kernel) {
  for (uint32_t seed = 0; seed < 2 * kSchedules; ++seed) {
    launch.seed = seed;
    const Report report = run(launch, kernel);
    EXPECT(report.fault == fault, label, ": wanted ", name(fault), ", got ", report.ok() ? "none" : report.what);
  }
}

constexpr Launch kTwoWarps{.grid = 2, .threads = 64, .shared = 1024};

// Each thread writes a word and reads its mirror image's.
template <bool kBarrier>
void mirror() {
  const Shared<int32_t> words = shared_memory().as<int32_t>();
  store(words + thread(), thread());
  if (kBarrier) sync();
  (void)load<int32_t>(words + (63 - thread()));
}

// A ring of one slot: written, read by the other warp, written again.
template <bool kSecondBarrier>
void reuse() {
  const Shared<int32_t> words = shared_memory().as<int32_t>();
  for (int round = 0; round < 3; ++round) {
    store(words + thread(), round);
    sync();
    (void)load<int32_t>(words + (thread() + 32) % 64);
    if (kSecondBarrier) sync();
  }
}

enum class Bug { None, NoWait, NoBarrier, WaitTooFew, NoCommit, NotWaitedAtAll };

template <Bug bug>
void copies(Global<const int32_t> x, Global<int32_t> y) {
  const Shared<char> arena = shared_memory();
  const int t = thread();
  if (t < 16) copy_async16(arena + t * 16, x + t * 4, 16);
  if (bug != Bug::NoCommit) copy_commit();
  if (t < 16) copy_async16(arena + 256 + t * 16, x + t * 4, 8);
  if (bug != Bug::NoCommit) copy_commit();
  if (bug == Bug::WaitTooFew) copy_wait<1>();
  if (bug == Bug::None || bug == Bug::NoBarrier || bug == Bug::NoCommit) copy_wait<0>();
  if (bug == Bug::NotWaitedAtAll) return;
  if (bug != Bug::NoBarrier) sync();
  const int word = 63 - t;
  const int32_t first = load<int32_t>(arena.as<int32_t>() + word);
  const int32_t second = load<int32_t>(arena.as<int32_t>() + 64 + word);
  store(y + static_cast<int64_t>(block()) * 64 + word, first + 1000 * second);
  if (bug == Bug::WaitTooFew) copy_wait<0>();
}

template <Bug bug>
Report copied(uint32_t seed, bool check) {
  Memory x("x", 256, kReadable | kDefined), y("y", 512, kWritable);
  for (int32_t i = 0; i < 64; ++i) std::memcpy(x.data() + 4 * i, &i, 4);
  Launch launch = kTwoWarps;
  launch.seed = seed;
  Report report = run(launch, [&] {
    copies<bug>(Global<const int32_t>(reinterpret_cast<const int32_t*>(x.data()), &x),
                Global<int32_t>(reinterpret_cast<int32_t*>(y.data()), &y));
  });
  if (check && report.ok())
    for (int32_t i = 0; i < 128; ++i) {
      int32_t got = 0;
      std::memcpy(&got, y.data() + 4 * i, 4);
      EXPECT(got == i % 64 + (i % 4 < 2 ? 1000 * (i % 64) : 0), "word ", i, " is ", got);
    }
  return report;
}

}  // namespace

TEST(harness_finds_races_of_barriers_left_out) {
  ends_with(Fault::None, "mirror", kTwoWarps, mirror<true>);
  ends_with(Fault::None, "reuse", kTwoWarps, reuse<true>);
  ends_with(Fault::Race, "write after read", kTwoWarps, reuse<false>);
  for (uint32_t seed = 0; seed < 16; ++seed) {
    Launch launch = kTwoWarps;
    launch.seed = seed;
    const Fault fault = run(launch, mirror<false>).fault;  // which of the two comes first is the schedule's choice
    EXPECT(fault == Fault::Race || fault == Fault::Uninitialized, "seed ", seed, " ", name(fault));
  }
}

TEST(harness_finds_races_between_blocks) {
  Memory y("y", 4, kWritable | kReadable | kDefined, 4);
  const Global<int32_t> word(reinterpret_cast<int32_t*>(y.data()), &y);
  ends_with(Fault::Race, "two writers", kTwoWarps, [=] {
    if (thread() == 0) store(word, 1);
  });
  ends_with(Fault::None, "atomics", kTwoWarps, [=] { atomic_add(word, 1); });
  Launch both = kTwoWarps;
  both.resident = 2;
  ends_with(Fault::None, "atomics of blocks side by side", both, [=] { atomic_add(word, 1); });
}

TEST(harness_models_asynchronous_copies) {
  for (uint32_t seed = 0; seed < 16; ++seed) {
    const Report good = copied<Bug::None>(seed, true);
    EXPECT(good.ok(), good.what);
    EXPECT(copied<Bug::NoWait>(seed, false).fault == Fault::InFlight ||
           copied<Bug::NoWait>(seed, false).fault == Fault::Leak);
    EXPECT(copied<Bug::WaitTooFew>(seed, false).fault == Fault::InFlight);
    EXPECT(copied<Bug::NoCommit>(seed, false).fault == Fault::InFlight);
    EXPECT(copied<Bug::NotWaitedAtAll>(seed, false).fault == Fault::Leak);
    const Fault unordered = copied<Bug::NoBarrier>(seed, false).fault;
    EXPECT(unordered == Fault::Race || unordered == Fault::InFlight || unordered == Fault::Uninitialized,
           name(unordered));
  }
}

TEST(harness_checks_bounds_alignment_and_permission) {
  Memory x("x", 64, kReadable | kDefined), y("y", 64, kWritable);
  x.permit(32, 16, 0);
  const Global<const int32_t> from(reinterpret_cast<const int32_t*>(x.data()), &x);
  const Global<int32_t> to(reinterpret_cast<int32_t*>(y.data()), &y);
  const Launch one{.grid = 1, .threads = 32, .shared = 64};
  ends_with(Fault::None, "inside", one, [=] { (void)load<int32_t>(from + thread() % 8); });
  ends_with(Fault::OutOfBounds, "past the end", one, [=] { (void)load<int32_t>(from + 16); });
  ends_with(Fault::OutOfBounds, "before the start", one, [=] { (void)load<int32_t>(from + -1); });
  ends_with(Fault::OutOfBounds, "null", one, [] { (void)load<int32_t>(Global<int32_t>()); });
  ends_with(Fault::OutOfBounds, "shared", one, [] { store(shared_memory().as<int32_t>() + 16, 1); });
  ends_with(Fault::Forbidden, "foreign channels", one, [=] { (void)load<int32_t>(from + 8); });
  ends_with(Fault::Forbidden, "reading an output", one, [=] { (void)load<int32_t>(to); });
  ends_with(Fault::Misaligned, "vector", one, [=] { (void)load<Vec<int32_t, 4>>(from + 1); });
  ends_with(Fault::Misaligned, "copy", one, [=] { copy_async16(shared_memory(), from + 2, 16); });
  ends_with(Fault::Uninitialized, "shared", one, [] { (void)load<int32_t>(shared_memory().as<int32_t>()); });
  ends_with(Fault::OutOfBounds, "copy of the end", one, [=] { copy_async16(shared_memory(), from + 12 + 4, 4); });
}

TEST(harness_finds_divergence_and_deadlock) {
  ends_with(Fault::Divergence, "two barriers", kTwoWarps, [] {
    if (thread() < 32)
      sync();
    else
      sync();
  });
  ends_with(Fault::Divergence, "a lane short", kTwoWarps, [] {
    if (lane() != 5) (void)ballot(true);
  });
  ends_with(Fault::Divergence, "not in the mask", kTwoWarps, [] { (void)ballot(true, 0xffff); });
  ends_with(Fault::Deadlock, "named barrier", kTwoWarps, [] {
    if (thread() < 32) sync_named(1, 64);
  });
  ends_with(Fault::None, "named barrier", kTwoWarps, [] { sync_named(1 + thread() / 32, 32); });
  ends_with(Fault::None, "halves of a warp", kTwoWarps, [] {
    const uint32_t mask = lane() < 16 ? 0xffffu : 0xffff0000u;
    EXPECT(ballot(lane() % 2 == 0, mask) == (0x55555555u & mask));
  });
}

TEST(harness_shuffles_order_nothing_but_sync_warp_does) {
  const Launch one{.grid = 1, .threads = 32, .shared = 256};
  const auto neighbour = [](bool ordered) {
    const Shared<int32_t> words = shared_memory().as<int32_t>();
    store(words + thread(), thread());
    (void)shuffle(thread(), 3);
    if (ordered) sync_warp();
    EXPECT(load<int32_t>(words + (thread() ^ 1)) == (thread() ^ 1));
  };
  ends_with(Fault::Race, "shuffle", one, [=] { neighbour(false); });
  ends_with(Fault::None, "sync_warp", one, [=] { neighbour(true); });
  ends_with(Fault::None, "values", one, [] {
    const int me = thread();
    EXPECT(shuffle(me, 3) == 3 && shuffle_xor(me, 5) == (me ^ 5));
    EXPECT(shuffle_down(me, 4) == (me < 28 ? me + 4 : me) && shuffle_up(me, 4) == (me >= 4 ? me - 4 : me));
  });
}

namespace {
// One m16n8 tile: rows of A and of B' (n by k) as 16-byte chunks in shared memory, through ldmatrix, as conv does.
template <class Store, class Mma>
void one_product(int depth, Store put, Mma mma) {
  float a[16][16], b[8][16], c[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < depth; ++k) a[i][k] = static_cast<float>((i * 7 + k * 3) % 11 - 5);
  for (int j = 0; j < 8; ++j)
    for (int k = 0; k < depth; ++k) b[j][k] = static_cast<float>((j * 5 + k * 2) % 13 - 6);
  for (uint32_t seed = 0; seed < 8; ++seed) {
    const Report report = run({.grid = 1, .threads = 32, .shared = 1024, .seed = seed}, [&] {
      const Shared<char> arena = shared_memory();
      const int l = lane();
      if (l < 16)
        put(arena + l * 32, a[l], depth);
      else if (l < 24)
        put(arena + 512 + (l - 16) * 32, b[l - 16], depth);
      sync_warp();
      uint32_t fa[4], fb[4];
      load_matrix_x4(fa, arena + (l % 16) * 32 + l / 16 * 16);
      load_matrix_x4(fb, arena + 512 + (l % 8) * 32 + l / 8 % 2 * 16);
      float acc[4] = {};
      const uint32_t low[2] = {fb[0], fb[1]};
      mma(acc, fa, low);
      for (int r = 0; r < 4; ++r) c[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2] = acc[r];
    });
    EXPECT(report.ok() && report.mma == 1, report.what);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        float want = 0;
        for (int k = 0; k < depth; ++k) want += a[i][k] * b[j][k];
        EXPECT(c[i][j] == want, "seed ", seed, " at ", i, ",", j, ": ", c[i][j], " for ", want);
      }
  }
}
template <class T>
void put_row(Shared<char> to, const float* row, int depth) {
  for (int k = 0; k < depth; ++k) store(to.as<T>() + k, from_float<T>(row[k]));
}
}  // namespace

TEST(harness_multiplies_fragments_as_the_manual_lays_them_out) {
  for (const bool cut : {false, true}) {
    truncate_products = cut;
    one_product(16, put_row<F16>, [](auto& c, auto& a, auto& b) { mma_f16(c, a, b); });
    one_product(16, put_row<BF16>, [](auto& c, auto& a, auto& b) { mma_bf16(c, a, b); });
    one_product(8, put_row<float>, [](auto& c, auto& a, auto& b) { mma_tf32(c, a, b); });
  }
  truncate_products = false;
}

TEST(harness_counts_bank_conflicts_and_sectors) {
  Memory x("x", 4096, kReadable | kDefined);
  const Global<const int32_t> from(reinterpret_cast<const int32_t*>(x.data()), &x);
  const auto cost = [&](Op op, auto kernel) {
    Report report = run({.grid = 1, .threads = 32, .shared = 4096, .counters = true}, kernel);
    EXPECT(report.ok(), report.what);
    return report.cost[op];
  };
  const auto words = [] { return shared_memory().as<int32_t>(); };
  const Cost straight = cost(Op::StoreShared, [=] { store(words() + lane(), 1); });
  EXPECT(straight.passes == 1 && straight.least == 1 && straight.bytes == 128 && straight.instructions == 1);
  EXPECT(cost(Op::StoreShared, [=] { store(words() + lane() * 2, 1); }).passes == 2);
  EXPECT(cost(Op::StoreShared, [=] { store(words() + lane() * 32, 1); }).passes == 32);
  const Cost wide = cost(Op::StoreShared, [=] { store(words() + lane() * 4, Vec<int32_t, 4>{}); });
  EXPECT(wide.passes == 4 && wide.least == 4, wide.passes);
  EXPECT(cost(Op::StoreShared, [=] { store(words() + lane() * 8, Vec<int32_t, 4>{}); }).passes == 8);
  const Cost dense = cost(Op::LoadGlobal, [=] { (void)load<int32_t>(from + lane()); });
  EXPECT(dense.passes == 4 && dense.least == 4 && dense.bytes == 128);
  const Cost spread = cost(Op::LoadGlobal, [=] { (void)load<int32_t>(from + lane() * 8); });
  EXPECT(spread.passes == 32 && spread.least == 4);
  EXPECT(cost(Op::LoadGlobal, [=] { (void)load<int32_t>(from); }).bytes == 4);
}

}  // namespace effkern::test::simt
