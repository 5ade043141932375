#include <cstring>

#include "../common/arena.h"
#include "../common/parallel.h"
#include "rows_impl.h"

namespace effkern::pq {
namespace {

constexpr int64_t kSumFloats = 1 << 17;  // sums of an item: 512 KiB, of which those of one block are in use for a while
constexpr int64_t kMostBlocks = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Worker {
 public:
  Worker(const Rows& rows, const Decoder& decoder, int64_t blocks)
      : p_(rows.problem), map_(rows), total_(rows.count()), decoder_(decoder), m_(decoder.matrix()), blocks_(blocks) {
    outputs_ = ceil_div(m_.rows, kOutputs) * kOutputs;
    const size_t sums = static_cast<size_t>(blocks * outputs_ * kLanes);
    const size_t inputs = static_cast<size_t>(blocks * p_.c_in * kLanes);
    const size_t tables = static_cast<size_t>(kTables * kTableEntries * kLanes);
    // Not a power of two: the lists of a position's rows begin in different sets of the L1 cache.
    named_pitch_ = m_.rows * kTables + 32;
    const size_t named = static_cast<size_t>(named_pitch_ * kTablePositions / kTables);
    Arena& arena = thread_arena();
    arena.reset(Arena::bytes(sums, 4) + Arena::bytes(inputs, 4) + Arena::bytes(tables, 4) + Arena::bytes(named, 2));
    sums_ = arena.take<float>(sums);
    inputs_ = arena.take<float>(inputs);
    tables_ = arena.take<float>(tables);
    named_ = arena.take<uint16_t>(named);
  }

  void operator()(int64_t item) {
    const Kernels& k = decoder_.inner();
    const int64_t row = item * blocks_ * kLanes, rows = std::min(blocks_ * kLanes, total_ - row);
    const int64_t blocks = ceil_div(rows, kLanes);
    turn_inputs(row, rows);
    std::memset(sums_, 0, static_cast<size_t>(blocks * outputs_ * kLanes) * sizeof(float));
    for (int64_t at = 0; at < m_.positions; at += kTablePositions) {
      const int64_t count = std::min(kTablePositions, m_.positions - at);
      decoder_.table_rows(at, count, named_, named_pitch_);
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = 0; j < count; j += kTables) add(k, at + j, std::min(kTables, count - j), b, j);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t y[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) y[r] = map_.y(row + b * kLanes + r);
      for (int64_t o = 0; o < m_.rows; o += kOutputs) {
        float c[kLanes * kOutputs];
        k.turn(sums_ + (b * outputs_ + o) * kLanes, c);
        store_rows(p_, y, std::min(kLanes, rows - b * kLanes), o, c);
      }
    }
  }

 private:
  // Fills the tables of `count` positions from `position` on and adds them to the sums of a block of rows.
  void add(const Kernels& k, int64_t position, int64_t count, int64_t block, int64_t listed) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t column = (position + j) * m_.d;
      const float* book = m_.book + (m_.books == 1 ? 0 : (position + j) * m_.entries * m_.d);
      k.fill_table(book, m_.entries, m_.d, std::min(m_.d, p_.c_in - column),
                   inputs_ + (block * p_.c_in + column) * kLanes, tables_ + j * kTableEntries * kLanes);
    }
    k.lookup(tables_, count, named_ + listed / kTables * named_pitch_, m_.rows, sums_ + block * outputs_ * kLanes);
  }

  // Rows side by side: [block][column][8], zeros after the last row.
  void turn_inputs(int64_t row, int64_t rows) {
    const conv::Activation& x = p_.x;
    for (int64_t r = 0; r < ceil_div(rows, kLanes) * kLanes; ++r) {
      float* to = inputs_ + r / kLanes * p_.c_in * kLanes + r % kLanes;
      const int64_t from = r < rows ? map_.x(row + r) : 0;
      if (r >= rows) {
        for (int64_t c = 0; c < p_.c_in; ++c) to[c * kLanes] = 0;
      } else if (x.dtype == DType::F32) {
        const float* in = static_cast<const float*>(x.data) + from;
        for (int64_t c = 0; c < p_.c_in; ++c) to[c * kLanes] = in[c * x.sc];
      } else {
        for (int64_t c = 0; c < p_.c_in; ++c) to[c * kLanes] = load_float(x.data, x.dtype, from + c * x.sc);
      }
    }
  }

  const conv::Problem& p_;
  const RowMap map_;
  const int64_t total_;
  const Decoder& decoder_;
  const CodedMatrix& m_;
  const int64_t blocks_;
  int64_t outputs_, named_pitch_;
  float *sums_, *inputs_, *tables_;
  uint16_t* named_;
};

}  // namespace

void run_lut(const Rows& rows, const Decoder& decoder) {
  const CodedMatrix& m = decoder.matrix();
  const int64_t total = rows.count();
  if (total == 0 || m.rows == 0) return;
  const int64_t all = ceil_div(total, kLanes), threads = num_threads();
  int64_t blocks = std::clamp<int64_t>(kSumFloats / (m.rows * kLanes), 1, kMostBlocks);
  blocks = std::min(blocks, ceil_div(all, threads));
  const int64_t items = ceil_div(all, blocks);
  blocks = ceil_div(all, items);  // even items
  parallel_for(0, ceil_div(all, blocks), 1, [&](int64_t begin, int64_t end) {
    Worker work(rows, decoder, blocks);
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

}  // namespace effkern::pq
