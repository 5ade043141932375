// pq_embedding and pq_embedding_bag on the CPU: only the rows asked for are decoded, straight into the output's row.
#include <vector>

#include "../common/parallel.h"
#include "coded.h"

namespace effkern::pq {
namespace {

constexpr int64_t kNoPadding = -1;
constexpr int64_t kAhead = 8;  // indices whose codes are on their way from memory while one is decoded

// Row numbers of a tensor of int32 or int64, dense.
class Index {
 public:
  Index(const Tensor& tensor, Arg arg) : tensor_(torch::stable::contiguous(tensor)) {
    check_cpu(tensor, arg);
    wide_ = tensor.scalar_type() == ScalarType::Long;
    EFFKERN_CHECK_TYPE(wide_ || tensor.scalar_type() == ScalarType::Int, arg.op, ": ", arg.name,
                       " must be int64 or int32");
    data_ = tensor_.const_data_ptr();
    size_ = tensor_.numel();
  }
  int64_t size() const { return size_; }
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  Tensor tensor_;
  const void* data_;
  int64_t size_;
  bool wide_;
};

void check_rows(const Index& idx, int64_t rows, const char* op) {
  for (int64_t i = 0; i < idx.size(); ++i)
    EFFKERN_CHECK_INDEX(idx[i] >= 0 && idx[i] < rows, op, ": idx must lie in [0, ", rows, "), got ", idx[i]);
}

int64_t padding_row(std::optional<int64_t> padding_idx, int64_t rows, const char* op) {
  if (!padding_idx.has_value()) return kNoPadding;
  EFFKERN_CHECK_VALUE(*padding_idx >= 0 && *padding_idx < rows, op, ": padding_idx must be in [0, ", rows, "), got ",
                      *padding_idx);
  return *padding_idx;
}

Tensor pq_embedding(const Tensor& idx, const Tensor& codes, const Tensor& codebook, const MaybeTensor& scale,
                    std::optional<int64_t> padding_idx) {
  constexpr const char* kOp = "pq_embedding";
  const Index index(idx, {kOp, "idx"});
  const CodedTensor coded(codes, codebook, -1, kOp);
  const CodedMatrix& m = coded.matrix();
  const FloatVector factor(scale, m.rows, codebook.scalar_type(), {kOp, "scale"}, /*finite=*/true);
  const int64_t padding = padding_row(padding_idx, m.rows, kOp), width = m.width();
  check_rows(index, m.rows, kOp);

  std::vector<int64_t> size;
  for (int64_t i = 0; i < idx.dim(); ++i) size.push_back(idx.size(i));
  size.push_back(width);
  Tensor y = torch::stable::empty({size.data(), size.size()}, codebook.scalar_type(), std::nullopt, codebook.device());
  const DType dtype = float_dtype(codebook, {kOp, "codebook"});
  void* to = y.mutable_data_ptr();
  parallel_for(0, index.size(), 1 + 16384 / width, [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(width));
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) coded.decoder().prefetch(index[i + kAhead]);
      const int64_t r = index[i];
      if (r == padding) {
        for (int64_t t = 0; t < width; ++t) store_float(to, dtype, i * width + t, 0.0f);
        continue;
      }
      coded.decoder().row(r, row.data());
      const float s = factor ? factor.data()[r] : 1.0f;
      for (int64_t t = 0; t < width; ++t) store_float(to, dtype, i * width + t, row[t] * s);
    }
  });
  coded.check_codes(kOp);
  return y;
}

void check_offsets(const Index& offsets, int64_t count, const char* op) {
  EFFKERN_CHECK_VALUE(offsets.size() > 0 || count == 0, op, ": offsets must name a bag for ", count,
                      " indices, got none");
  for (int64_t b = 0; b < offsets.size(); ++b) {
    EFFKERN_CHECK_VALUE(b > 0 || offsets[0] == 0, op, ": offsets must start at 0, got ", offsets[0]);
    EFFKERN_CHECK_VALUE(offsets[b] <= count && (b == 0 || offsets[b] >= offsets[b - 1]), op,
                        ": offsets must not fall and must not exceed ", count, " indices, got ", offsets[b],
                        " for bag ", b);
  }
}

Tensor pq_embedding_bag(const Tensor& idx, const Tensor& codes, const Tensor& codebook, const Tensor& offsets,
                        const MaybeTensor& scale, Text mode, const MaybeTensor& per_sample_weights,
                        std::optional<int64_t> padding_idx) {
  constexpr const char* kOp = "pq_embedding_bag";
  EFFKERN_CHECK_VALUE(idx.dim() == 1 && offsets.dim() == 1, kOp, ": idx and offsets must be 1-d, got shapes ",
                      shape_text(idx), " and ", shape_text(offsets));
  EFFKERN_CHECK_VALUE(mode == "sum" || mode == "mean", kOp, ": mode must be sum or mean, got '", mode, "'");
  EFFKERN_CHECK_VALUE(mode == "sum" || !per_sample_weights.has_value(), kOp,
                      ": per_sample_weights need mode 'sum', got '", mode, "'");
  const Index index(idx, {kOp, "idx"}), starts(offsets, {kOp, "offsets"});
  const CodedTensor coded(codes, codebook, -1, kOp);
  const CodedMatrix& m = coded.matrix();
  const ScalarType book_type = codebook.scalar_type();
  const FloatVector factor(scale, m.rows, book_type, {kOp, "scale"}, /*finite=*/true);
  const FloatVector weights(per_sample_weights, index.size(), book_type, {kOp, "per_sample_weights"});
  const int64_t padding = padding_row(padding_idx, m.rows, kOp), width = m.width(), bags = starts.size();
  check_rows(index, m.rows, kOp);
  check_offsets(starts, index.size(), kOp);

  const int64_t shape[] = {bags, width};
  Tensor y = torch::stable::empty({shape, 2}, book_type, std::nullopt, codebook.device());
  const DType dtype = float_dtype(codebook, {kOp, "codebook"});
  void* to = y.mutable_data_ptr();
  parallel_for(0, bags, 1, [&](int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(width)), sum(static_cast<size_t>(width));
    for (int64_t b = first; b < last; ++b) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      int64_t kept = 0;
      const int64_t end = b + 1 < bags ? starts[b + 1] : index.size();
      for (int64_t i = starts[b]; i < end; ++i) {
        if (i + kAhead < end) coded.decoder().prefetch(index[i + kAhead]);
        const int64_t r = index[i];
        if (r == padding) continue;
        ++kept;
        coded.decoder().row(r, row.data());
        const float s = (factor ? factor.data()[r] : 1.0f), w = weights ? weights.data()[i] : 1.0f;
        for (int64_t t = 0; t < width; ++t) sum[t] += row[t] * s * w;
      }
      const float divisor = mode == "mean" && kept > 0 ? static_cast<float>(kept) : 1.0f;
      for (int64_t t = 0; t < width; ++t) store_float(to, dtype, b * width + t, sum[t] / divisor);
    }
  });
  coded.check_codes(kOp);
  return y;
}

}  // namespace
}  // namespace effkern::pq

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("pq_embedding", TORCH_BOX(&effkern::pq::pq_embedding));
  m.impl("pq_embedding_bag", TORCH_BOX(&effkern::pq::pq_embedding_bag));
}
