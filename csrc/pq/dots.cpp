#include <cstring>
#include <vector>

#include "../common/arena.h"
#include "../common/parallel.h"
#include "rows_impl.h"

namespace effkern::pq {
namespace {

constexpr int64_t kBlock = 64;             // positions whose offsets are worked out at a time: 4 KiB of L1
constexpr int64_t kBatchFloats = 1 << 17;  // input that stays in L2 while the panels pass: 512 KiB
constexpr int64_t kLeastRows = 12, kMostRows = 96;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a matrix is read: as it lies, or with sub-vectors filled up with zeros to a length that vectors can be made of.
struct Layout {
  int64_t d;          // of the sub-vectors read by vectors
  bool padded;        // d is not that of the matrix
  int64_t positions;  // whole sub-vectors, an even number where two make a vector
  int64_t left;       // columns after them
  int64_t block;      // positions of a block
  int64_t pitch;      // floats of a row that was copied
};

Layout layout_of(const CodedMatrix& m, int64_t columns) {
  Layout l;
  l.d = m.d <= 4 ? 4 : ceil_div(m.d, 8) * 8;
  l.padded = l.d != m.d;
  l.positions = columns / m.d;
  if (l.d == 4) l.positions -= l.positions % 2;
  l.left = columns - l.positions * m.d;
  l.block = std::max<int64_t>(1, kBlock / 2 / m.stages) * 2;
  l.pitch = l.positions * l.d + l.left;
  return l;
}

struct Plan {
  Layout layout;
  const float* book;  // with sub-vectors of layout.d
  bool in_place;      // the input is read where it lies
  int64_t batch;      // rows of an item
};

class Worker {
 public:
  Worker(const Rows& rows, const Decoder& decoder, const Plan& plan)
      : p_(rows.problem), map_(rows), total_(rows.count()), decoder_(decoder), plan_(plan), l_(plan.layout) {
    const int64_t stages = decoder.matrix().stages;
    // The columns left over are fewer than two sub-vectors.
    const size_t offsets = static_cast<size_t>(std::max<int64_t>(l_.block, 2) * stages * kOutputs);
    const size_t copy = plan.in_place ? 0 : static_cast<size_t>(plan.batch * l_.pitch);
    const size_t sums = static_cast<size_t>(plan.batch * kOutputs * kLanes);
    const size_t results = static_cast<size_t>(plan.batch * kOutputs), pointers = static_cast<size_t>(plan.batch);
    Arena& arena = thread_arena();
    arena.reset(Arena::bytes(pointers, sizeof(int64_t)) + Arena::bytes(offsets, 4) + Arena::bytes(copy, 4) +
                Arena::bytes(sums, 4) + Arena::bytes(results, 4) + Arena::bytes(pointers, sizeof(float*)));
    offsets_ = arena.take<uint32_t>(offsets);
    copy_ = arena.take<float>(copy);
    sums_ = arena.take<float>(sums);
    results_ = arena.take<float>(results);
    x_ = arena.take<const float*>(pointers);
    y_ = arena.take<int64_t>(pointers);
  }

  void operator()(int64_t batch, int64_t panel) {
    if (batch != batch_) begin(batch);
    const Kernels& k = decoder_.inner();
    const CodedMatrix& m = decoder_.matrix();
    const int64_t first = panel * kOutputs, live = std::min(kOutputs, m.rows - first);
    std::memset(sums_, 0, static_cast<size_t>(rows_ * kOutputs * kLanes) * sizeof(float));
    for (int64_t at = 0; at < l_.positions; at += l_.block) {
      const int64_t count = std::min(l_.block, l_.positions - at);
      decoder_.offsets(first, live, at, count, l_.d, offsets_);
      for (int64_t r = 0; r < rows_; r += k.dot_rows) {
        const float* x[kOutputs];
        const int64_t n = std::min(k.dot_rows, rows_ - r);
        for (int64_t i = 0; i < n; ++i) x[i] = x_[r + i] + at * l_.d;
        k.dots(plan_.book, offsets_, count, m.stages, l_.d, x, n, sums_ + r * kOutputs * kLanes);
      }
    }
    k.reduce(sums_, rows_ * kOutputs, results_);
    if (l_.left > 0) add_left(first, live);
    store_rows(p_, y_, rows_, first, results_);
  }

 private:
  // Rows of a batch: pointers to them, or copies in fp32 with channels together and sub-vectors filled up.
  void begin(int64_t batch) {
    batch_ = batch;
    row_ = batch * plan_.batch;
    rows_ = std::min(plan_.batch, total_ - row_);
    const conv::Activation& x = p_.x;
    const int64_t d = decoder_.matrix().d, whole = l_.positions * d;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t from = map_.x(row_ + r);
      y_[r] = map_.y(row_ + r);
      if (plan_.in_place) {
        x_[r] = static_cast<const float*>(x.data) + from;
        continue;
      }
      float* to = copy_ + r * l_.pitch;
      x_[r] = to;
      for (int64_t c = 0; c < whole; c += d, to += l_.d) {
        for (int64_t t = 0; t < d; ++t) to[t] = load_float(x.data, x.dtype, from + (c + t) * x.sc);
        for (int64_t t = d; t < l_.d; ++t) to[t] = 0;
      }
      for (int64_t t = 0; t < l_.left; ++t) to[t] = load_float(x.data, x.dtype, from + (whole + t) * x.sc);
    }
  }

  void add_left(int64_t first, int64_t live) {
    const CodedMatrix& m = decoder_.matrix();
    const int64_t positions = ceil_div(l_.left, m.d), start = l_.positions * l_.d;
    decoder_.offsets(first, live, l_.positions, positions, m.d, offsets_);
    for (int64_t t = 0; t < l_.left; ++t) {
      float column[kOutputs];
      const uint32_t* entry = offsets_ + t / m.d * m.stages * kOutputs;
      for (int64_t o = 0; o < kOutputs; ++o) {
        column[o] = m.book[entry[o] + t % m.d];
        for (int64_t s = 1; s < m.stages; ++s) column[o] += m.book[entry[s * kOutputs + o] + t % m.d];
      }
      for (int64_t r = 0; r < rows_; ++r) {
        const float x = x_[r][start + t];
        for (int64_t o = 0; o < kOutputs; ++o) results_[r * kOutputs + o] += x * column[o];
      }
    }
  }

  const conv::Problem& p_;
  const RowMap map_;
  const int64_t total_;
  const Decoder& decoder_;
  const Plan& plan_;
  const Layout& l_;
  int64_t batch_ = -1, row_ = 0, rows_ = 0;
  uint32_t* offsets_;
  float *copy_, *sums_, *results_;
  const float** x_;
  int64_t* y_;
};

}  // namespace

void run_dots(const Rows& rows, const Decoder& decoder) {
  const CodedMatrix& m = decoder.matrix();
  const conv::Problem& p = rows.problem;
  const int64_t total = rows.count(), panels = ceil_div(m.rows, kOutputs);
  if (total == 0 || panels == 0) return;
  Plan plan;
  plan.layout = layout_of(m, p.c_in);
  std::vector<float> padded;
  plan.book = m.book;
  if (plan.layout.padded) {
    padded.resize(static_cast<size_t>(m.books * m.entries * plan.layout.d));
    for (int64_t e = 0; e < m.books * m.entries; ++e)
      std::copy_n(m.book + e * m.d, m.d, padded.data() + e * plan.layout.d);
    plan.book = padded.data();
  }
  plan.in_place = p.x.dtype == DType::F32 && p.x.sc == 1 && !plan.layout.padded;
  plan.batch =
      std::min(total, std::clamp(kBatchFloats / std::max<int64_t>(plan.layout.pitch, 1), kLeastRows, kMostRows));
  const int64_t batches = ceil_div(total, plan.batch);
  plan.batch = ceil_div(total, batches);  // even batches
  const auto body = [&](int64_t begin, int64_t end) {
    Worker work(rows, decoder, plan);
    for (int64_t i = begin; i < end; ++i) work(i / panels, i % panels);
  };
  // A pool of threads costs 5 to 10 us a call: 20 us at 30 GMAC/s.
  constexpr double kMacs = 6e5;
  if (static_cast<double>(total) * m.rows * p.c_in < kMacs)
    body(0, batches * panels);
  else
    parallel_for(0, batches * panels, 1, body);
}

}  // namespace effkern::pq
