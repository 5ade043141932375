#include "keep.h"

#include <algorithm>

namespace effkern::block_skip {
namespace {

float read(const void* data, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::Float:
      return load_float(data, DType::F32, i);
    case ScalarType::BFloat16:
      return load_float(data, DType::BF16, i);
    case ScalarType::Half:
      return load_float(data, DType::F16, i);
    default:  // bool or uint8
      return static_cast<float>(static_cast<const uint8_t*>(data)[i]);
  }
}

bool supported(ScalarType type) {
  return type == ScalarType::Bool || type == ScalarType::Byte || type == ScalarType::Float ||
         type == ScalarType::BFloat16 || type == ScalarType::Half;
}

}  // namespace

KeepMask::KeepMask(const View& keep, int64_t dim, Arg arg) {
  check_cpu(keep, arg);
  const ScalarType type = keep.scalar_type();
  EFFKERN_CHECK_TYPE(supported(type), arg.op, ": ", arg.name,
                     " must be bool, uint8, float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  EFFKERN_CHECK_VALUE(keep.dim() == dim, arg.op, ": ", arg.name, " must be ", dim == 1 ? "1-d [N]" : "2-d [N, B]",
                      ", got shape ", shape_text(keep));
  samples_ = keep.size(0);
  blocks_ = dim == 2 ? keep.size(1) : 1;
  value_.resize(static_cast<size_t>(samples_ * blocks_));
  if (value_.empty()) return;
  const void* data = keep.const_data_ptr();
  const int64_t sn = keep.stride(0), sb = dim == 2 ? keep.stride(1) : 0;
  for (int64_t n = 0; n < samples_; ++n)
    for (int64_t b = 0; b < blocks_; ++b) {
      const float v = read(data, type, n * sn + b * sb);
      EFFKERN_CHECK_VALUE(v >= 0 && v <= 1, arg.op, ": ", arg.name, ": entries must be in [0, 1], got ", v,
                          " for sample ", n);
      value_[n * blocks_ + b] = v;
    }
}

double KeepMask::share() const {
  if (value_.empty()) return 0;
  const auto dropped = std::count(value_.begin(), value_.end(), 0.0f);
  return 1 - static_cast<double>(dropped) / static_cast<double>(value_.size());
}

Decision KeepMask::decide(int64_t block, int64_t begin, int64_t end) const {
  Decision d;
  for (int64_t n = begin; n < end; ++n) {
    const float v = at(n, block);
    if (v == 0) {
      d.dropped.push_back(n - begin);
    } else if (v == 1) {
      d.kept.push_back(n - begin);
    } else {
      d.soft.push_back(n - begin);
      d.gate.push_back(v);
    }
  }
  return d;
}

}  // namespace effkern::block_skip
