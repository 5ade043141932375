// y = relu(sum over 1 to 4 branches of batch_norm(x_i)), forward and backward. Raw pointers, no torch.
#pragma once

#include <cstdint>

#include "../conv/problem.h"

namespace effkern::multi_branch_bn {

using conv::Activation;

constexpr int kMaxBranches = 4;

// What both directions are given. Vectors have one entry a channel; tables are [branches][channels].
struct Branches {
  int count = 0;
  // How y and every dx lie: channels innermost, or a dense plane a channel. x may lie in any way; it is read in place
  // if it is fp32 and lies like y, through a buffer in the L1 cache otherwise.
  bool interleaved = false;
  Activation x[kMaxBranches];
  const float *weight[kMaxBranches] = {}, *bias[kMaxBranches] = {};
  bool training = false, relu = false;
};

struct Forward : Branches {
  Activation y;
  // Null in training: nothing is tracked. Given otherwise.
  const float *running_mean[kMaxBranches] = {}, *running_var[kMaxBranches] = {};
  double momentum = 0, eps = 0;
  double *mean = nullptr, *invstd = nullptr;      // tables, written: what the forward pass normalised with
  float *new_mean = nullptr, *new_var = nullptr;  // tables, written in training if statistics are tracked
};

struct Backward : Branches {
  Activation grad;              // at y, any strides
  Activation dx[kMaxBranches];  // data is null where none is wanted
  const double *mean = nullptr, *invstd = nullptr;
  float* dweight = nullptr;  // table, written
  float* dbias = nullptr;    // one vector, written: all branches have the same
};

// Sums are taken over fixed ranges in a fixed order, so no bit depends on the number of threads; with fixed statistics
// (training = false) a sample's result does not depend on the other samples either.
void forward(const Forward& problem);
void backward(const Backward& problem);

}  // namespace effkern::multi_branch_bn
