// What the gradient at the sum of a skipped block (block_grad.cuh) is given.
#pragma once

#include "../common/cuda/columns.h"
#include "../common/cuda/stream.h"
#include "../conv/conv_gpu.h"

namespace effkern::block_skip {

// For each sample y = m * act(z) + (1 - m) * old with m = keep[sample]: gz = m * gy * act'(z) and
// rest = gz + (1 - m) * gy where m is not 0; where it is, gz is left as it is and rest = gy. Maps of all samples, rows
// of channels.
template <class T>
struct BlockGrad : device::Pieces {
  device::Rows<const T> gy, z, old;  // z: for relu and relu6 may be the output instead; .at null: the slope is 1
  device::Rows<T> gz, rest;          // .at null: not wanted
  device::Global<const float> keep;  // null: 1
  int64_t keep_step;                 // from sample to sample
  bool soft;                         // else what is not 0 is 1
  device::Global<float> sums;        // [samples * pieces][channels]: of gz; null: not wanted
  device::Global<float> dots;        // [pieces * channel groups][samples]: of gy * (act(z) - old); null: not wanted
  conv::gpu::Act act;
  bool wide;  // 16-byte access to all maps
};

// Bytes that the kernel's instructions ask for where `kept` samples are kept.
struct BlockGradWork {
  int64_t bytes_read = 0, bytes_written = 0;
};
template <class T>
BlockGradWork block_grad_work(const BlockGrad<T>& p, int64_t kept) {
  const int64_t map = int64_t{p.pixels} * p.channels * static_cast<int64_t>(sizeof(T));
  const int64_t blocks = p.template blocks<T>();
  const int64_t seen = p.dots ? p.samples : kept, gy = p.rest.at ? p.samples : seen;
  BlockGradWork work;
  work.bytes_read = map * (gy + (p.z.at ? seen : 0) + (p.dots ? seen : 0));
  if (p.keep) work.bytes_read += blocks * device::kColumnThreads * 4;
  work.bytes_written = map * ((p.gz.at ? kept : 0) + (p.rest.at ? p.samples : 0));
  if (p.sums) work.bytes_written += int64_t{p.samples} * p.pieces * p.channels * 4;
  if (p.dots) work.bytes_written += blocks * 4;
  return work;
}

template <class T>
void run(const BlockGrad<T>& p, device::Stream stream);  // one launch

}  // namespace effkern::block_skip
