// compact on CUDA: checks, one launch on torch's current stream. Unlike on the CPU the entries are not checked to be in
// [0, 1], which would take a trip to the host: everything that is not zero is kept.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../common/check.h"
#include "../common/cuda/launch.cuh"
#include "compact.cuh"

namespace effkern::block_skip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Bits>
void launch(const Tensor& keep, Bits magnitude, Tensor& idx, Tensor& count, cudaStream_t stream) {
  const int64_t n = keep.size(0), columns = keep.dim() == 2 ? keep.size(1) : 1;
  const int64_t column_stride = keep.dim() == 2 ? keep.stride(1) : 0;
  device::launch("compact", compact<Bits>, static_cast<unsigned>(columns), kCompactThreads, kCompactShared, stream,
                 device::Global<const Bits>(static_cast<const Bits*>(keep.const_data_ptr())), magnitude, n,
                 keep.stride(0), column_stride, device::Global<int32_t>(static_cast<int32_t*>(idx.mutable_data_ptr())),
                 device::Global<int32_t>(static_cast<int32_t*>(count.mutable_data_ptr())));
}

std::tuple<Tensor, Tensor> compact_cuda(const Tensor& keep) {
  EFFKERN_CHECK_VALUE(keep.dim() == 1 || keep.dim() == 2, "compact: keep must be [N] or [N, B], got ", keep.dim(),
                      " dimensions");
  const bool many = keep.dim() == 2;
  const int64_t n = keep.size(0), columns = many ? keep.size(1) : 1;
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  EFFKERN_CHECK_VALUE(n <= most && columns <= most, "compact: keep must have fewer than 2^31 rows and columns");
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  const int64_t shape[] = {columns, n};
  Tensor idx =
      torch::stable::empty({many ? shape : shape + 1, many ? 2u : 1u}, ScalarType::Int, std::nullopt, keep.device());
  Tensor count = torch::stable::empty({shape, many ? 1u : 0u}, ScalarType::Int, std::nullopt, keep.device());
  if (columns == 0) return {idx, count};
  auto stream =
      static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(keep.get_device_index()).nativeHandle());
  switch (keep.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      launch<uint8_t>(keep, 0xff, idx, count, stream);
      break;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      launch<uint16_t>(keep, 0x7fff, idx, count, stream);
      break;
    case ScalarType::Float:
      launch<uint32_t>(keep, 0x7fffffff, idx, count, stream);
      break;
    default:
      fail("TypeError", "compact: keep must be bool, uint8, float32, bfloat16 or float16");
  }
  return {idx, count};
}

}  // namespace
}  // namespace effkern::block_skip

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, m) { m.impl("compact", TORCH_BOX(&effkern::block_skip::compact_cuda)); }
