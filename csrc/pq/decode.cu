#include "../common/cuda/launch.cuh"
#include "decode.cuh"

namespace effkern::pq {
namespace {

template <class T, int kPer, bool kWhole>
void launch(const Decoding<T>& p, device::Stream stream) {
  const int64_t needed = (int64_t{p.rows} * decode_rounds(p, kPer) + kDecodeWarps - 1) / kDecodeWarps;
  const unsigned resident = device::resident_blocks("decode", decode<T, kPer, kWhole>, kDecodeThreads, 0);
  device::launch("decode", decode<T, kPer, kWhole>, needed < resident ? static_cast<unsigned>(needed) : resident,
                 kDecodeThreads, 0, stream, p);
}

template <class T>
void run_as(const Decoding<T>& p, device::Stream stream) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  if (p.rows == 0 || p.taps == 0 || p.channels == 0) return;
  if (p.channels % kPer != 0 || !aligned(p.y.p)) return launch<T, 1, false>(p, stream);
  if (p.taps == 1 && p.d % kPer == 0 && aligned(p.book.p)) return launch<T, kPer, true>(p, stream);
  launch<T, kPer, false>(p, stream);
}

}  // namespace

void run(const Decoding<device::F16>& p, device::Stream stream) { run_as(p, stream); }
void run(const Decoding<device::BF16>& p, device::Stream stream) { run_as(p, stream); }
void run(const Decoding<float>& p, device::Stream stream) { run_as(p, stream); }

}  // namespace effkern::pq
