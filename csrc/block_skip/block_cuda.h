// What the forward and backward ops of block skipping on CUDA share.
#pragma once

#include <string>
#include <vector>

#include "../conv/conv_op.h"

namespace effkern::block_skip {

struct Arguments {
  const char* op;
  const Tensor &x, &keep;
  std::vector<Tensor> weights, biases;  // 2 of 3x3, or 3 of 1x1, 3x3, 1x1
  int64_t stride;
  const MaybeTensor& res;
  std::string act, algo;
};

// Everything about the convolutions of a block that does not depend on the mask.
struct Conv {
  Tensor weight;
  MaybeTensor bias;
  PackedWeight::Dims dims;
  Geometry geometry;
};

// Floats may be between 0 and 1: they blend.
bool is_soft(const Tensor& keep);

void check_keep(const Tensor& keep, const Tensor& x, Arg arg);

// Launches compact over a [N] or [N, B] mask. idx: [B][N], count: [B]. rest: the dropped rows follow behind.
void sort(const device::Scope& scope, const Tensor& keep, Tensor& idx, Tensor& count, bool rest);

// first: the number of the block's first weight in messages, counted from 0.
std::vector<Conv> convs_of(const Arguments& a, size_t first = 0);

// With samples of contiguous elements, as idle blocks copy them.
Tensor dense(const Tensor& map);

Tensor skip_block(const Arguments& a);

}  // namespace effkern::block_skip
