// pq_embedding and pq_embedding_bag on CUDA: one launch. Indices, offsets and codes never come to the host, so the
// kernel holds to their range what the CPU refuses.
#include <string>
#include <vector>

#include "codes_cuda.h"
#include "embedding_gpu.h"

namespace effkern::pq {
namespace {

struct Arguments {
  const char* op;
  const Tensor &idx, &codes, &codebook;
  const Tensor* offsets;  // null: every index is a bag
  const MaybeTensor &scale, &weights;
  bool mean;
  std::optional<int64_t> padding;
};

device::Indices list(const device::Scope& scope, Tensor& dense, const Tensor& x, Arg arg) {
  device::check_here(dense, x, arg);
  const bool wide = dense.scalar_type() == ScalarType::Long;
  EFFKERN_CHECK_TYPE(wide || dense.scalar_type() == ScalarType::Int, arg.op, ": ", arg.name, " must be int64 or int32");
  EFFKERN_CHECK_VALUE(dense.numel() < kLimit, arg.op, ": ", arg.name, " must have fewer than 2^31 entries");
  dense = torch::stable::contiguous(dense);
  return {scope.of<const int32_t>(dense), wide ? 2 : 1, wide};
}

template <class T>
Lookup<T> lookup_of(const device::Scope& scope, const Arguments& a, Tensor& idx, Tensor& offsets, const Coded& table,
                    const MaybeTensor& scale, const MaybeTensor& weights, Tensor& y) {
  Lookup<T> p{};
  p.idx = list(scope, idx, a.codebook, {a.op, "idx"});
  if (a.offsets != nullptr) p.offsets = list(scope, offsets, a.codebook, {a.op, "offsets"});
  p.codes = table.as_codes(scope);
  p.book = scope.of<const T>(table.book);
  if (scale) p.scale = scope.of<const float>(*scale);
  if (weights) p.weights = scope.of<const float>(*weights);
  p.y = scope.of<T>(y);
  p.count = static_cast<int32_t>(idx.numel());
  p.bags = static_cast<int32_t>(a.offsets != nullptr ? offsets.numel() : idx.numel());
  p.rows = static_cast<int32_t>(table.rows), p.positions = static_cast<int32_t>(table.positions);
  p.stages = static_cast<int32_t>(table.stages), p.d = static_cast<int32_t>(table.d);
  p.book_per_position = table.book_per_position, p.book_per_stage = table.book_per_stage;
  p.mean = a.mean;
  p.padding = static_cast<int32_t>(a.padding.value_or(-1));
  const auto aligned = [](const T* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  p.wide = p.d * sizeof(T) % 16 == 0 && aligned(p.book.p) && aligned(p.y.p);
  return p;
}

Tensor run(const Arguments& a, const std::vector<int64_t>& bags) {
  const char* op = a.op;
  const Coded table = coded(a.codes, a.codebook, -1, a.codebook, op);
  EFFKERN_CHECK_VALUE(!a.padding || (*a.padding >= 0 && *a.padding < table.rows), op, ": padding_idx must be in [0, ",
                      table.rows, "), got ", a.padding.value_or(0));
  EFFKERN_CHECK_INDEX(table.rows > 0 || a.idx.numel() == 0, op, ": idx must be empty for a table without rows");
  const device::Scope scope(a.codebook, {op, "codebook"});
  const ScalarType dtype = a.codebook.scalar_type();
  const MaybeTensor scale = device::vector(a.scale, a.codes.size(0), true, dtype, a.codebook, {a.op, "scale"});
  const MaybeTensor weights =
      device::vector(a.weights, a.idx.numel(), true, dtype, a.codebook, {a.op, "per_sample_weights"});
  std::vector<int64_t> size = bags;
  size.push_back(a.codes.size(1) * a.codebook.size(2));
  Tensor y = torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt, a.codebook.device());
  Tensor idx = a.idx, offsets = a.offsets != nullptr ? *a.offsets : a.idx;
  device::in_type(dtype, [&]<class T>(T) {
    const Lookup<T> p = lookup_of<T>(scope, a, idx, offsets, table, scale, weights, y);
    if (y.numel() > 0) pq::run(p, scope.stream());
  });
  return y;
}

Tensor pq_embedding(const Tensor& idx, const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale,
                    std::optional<int64_t> padding_idx) {
  std::vector<int64_t> bags;
  for (int64_t i = 0; i < idx.dim(); ++i) bags.push_back(idx.size(i));
  const MaybeTensor none;
  return run({"pq_embedding", idx, codes, codebook, nullptr, scale, none, false, padding_idx}, bags);
}

Tensor pq_embedding_bag(const Tensor& idx, const Tensor& codes, const Tensor& codebook, const Tensor& offsets,
                        const MaybeTensor& scale, Text mode, const MaybeTensor& per_sample_weights,
                        std::optional<int64_t> padding_idx) {
  constexpr const char* op = "pq_embedding_bag";
  EFFKERN_CHECK_VALUE(idx.dim() == 1 && offsets.dim() == 1, op, ": idx and offsets must be 1-d, got shapes ",
                      shape_text(idx), " and ", shape_text(offsets));
  EFFKERN_CHECK_VALUE(mode == "sum" || mode == "mean", op, ": mode must be sum or mean, got '", mode, "'");
  EFFKERN_CHECK_VALUE(mode == "sum" || !per_sample_weights.has_value(), op,
                      ": per_sample_weights need mode 'sum', got '", mode, "'");
  EFFKERN_CHECK_VALUE(offsets.size(0) > 0 || idx.size(0) == 0, op, ": offsets must name a bag for ", idx.size(0),
                      " indices, got none");
  return run({op, idx, codes, codebook, &offsets, scale, per_sample_weights, mode == "mean", padding_idx},
             {offsets.size(0)});
}

}  // namespace
}  // namespace effkern::pq

EFFKERN_CUDA_OPS(m) {
  m.impl("pq_embedding", TORCH_BOX(&effkern::pq::pq_embedding));
  m.impl("pq_embedding_bag", TORCH_BOX(&effkern::pq::pq_embedding_bag));
}
