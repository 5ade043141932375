// Codes and codebook as they come from torch, checked, as the decoder takes them.
#pragma once

#include <vector>

#include "../common/tensor.h"
#include "decode.h"

namespace effkern::pq {

class CodedTensor {
 public:
  // columns: numbers in a weight row, or -1 if any length will do. TypeError, ValueError for what does not fit.
  CodedTensor(const Tensor& codes, const Tensor& codebook, int64_t columns, const char* op);

  const Decoder& decoder() const { return decoder_; }
  const CodedMatrix& matrix() const { return decoder_.matrix(); }

  // ValueError if a code read so far does not exist in the codebook.
  void check_codes(const char* op) const;

  // Reads every code, then as above: for calls that have nothing to compute.
  void check_all_codes(const char* op) const;

 private:
  Tensor codes_;             // keeps a dense copy alive where the given codes are strided
  std::vector<float> book_;  // fp32 copy of a codebook that is not dense fp32
  Tensor codebook_;
  Decoder decoder_;

  CodedMatrix describe(const Tensor& codes, const Tensor& codebook, int64_t columns, const char* op);
};

}  // namespace effkern::pq
