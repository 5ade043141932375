#include "../common/cuda/launch.cuh"
#include "book_grad.cuh"

namespace effkern::pq {
namespace {

// One block a piece, or as many as walk over all of them.
unsigned blocks_for(int64_t pieces) {
  constexpr int64_t kMost = 1 << 20;
  return static_cast<unsigned>(pieces < kMost ? pieces : kMost);
}

}  // namespace

template <class T>
void run(const BookGrad<T>& p, device::Stream stream) {
  const int64_t blocks = int64_t{book_tables(p)} * p.books * p.slices;
  EFFKERN_CHECK_VALUE(blocks <= INT32_MAX, "book_grad: there are too many codes and books: ", blocks, " tables");
  const int32_t per = (p.chunk + kBookGradWarps - 1) / kBookGradWarps;
  device::launch("book_grad", book_grad<T>, static_cast<unsigned>(blocks), kBookGradThreads,
                 per * kBookGradWarps * p.width * 4, stream, p);
}

template <class U>
void run(const BookFold<U>& p, device::Stream stream) {
  if (p.size == 0) return;
  device::launch("book_fold", book_fold<U>, blocks_for((p.size + kBookFoldThreads - 1) / kBookFoldThreads),
                 kBookFoldThreads, 0, stream, p);
}

template <class T>
void run(const RowDots<T>& p, device::Stream stream) {
  if (p.of.rows == 0) return;
  device::launch("row_dots", row_dots<T>, blocks_for((p.of.rows + kRowDotsWarps - 1) / kRowDotsWarps), kRowDotsThreads,
                 0, stream, p);
}

#define EFFKERN_INSTANCES(T)                               \
  template void run(const BookGrad<T>& p, device::Stream); \
  template void run(const BookFold<T>& p, device::Stream); \
  template void run(const RowDots<T>& p, device::Stream);
EFFKERN_INSTANCES(device::F16)
EFFKERN_INSTANCES(device::BF16)
EFFKERN_INSTANCES(float)
#undef EFFKERN_INSTANCES

}  // namespace effkern::pq
