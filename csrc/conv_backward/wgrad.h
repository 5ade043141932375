// Gradients of a convolution in its weight and bias, for the listed samples and the listed channel prefix. Raw pointers
// only.
#pragma once

#include "../conv/problem.h"

namespace effkern::conv {

// A gradient [groups][out][in][kh][kw] to write; strides in elements.
struct WeightGrad {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::F32;
  int64_t group_stride = 0;  // from one group's first output to the next's
  int64_t so = 0, si = 0, sh = 0, sw = 0;
};

struct WgradProblem {
  Activation x, gy;  // channels past c_in of x and past c_out of gy are never touched
  // Listed samples: listed sample i reads x sample x_rows[i] and gy sample gy_rows[i]; null = i.
  int64_t count = 0;
  const int64_t* x_rows = nullptr;
  const int64_t* gy_rows = nullptr;
  int64_t c_in = 0, c_out = 0;  // active channels, all running groups together
  int64_t groups = 1;           // running groups; c_in and c_out are multiples
  int64_t kh = 1, kw = 1;
  int64_t stride[2] = {1, 1}, pad[2] = {0, 0}, dil[2] = {1, 1};
  WeightGrad gw;
  float* gb = nullptr;      // [c_out], the sum of gy over everything but the channel; null: not wanted
  bool accumulate = false;  // add to gw (which is fp32 then) and gb instead of overwriting them
};

// Runs on all threads of the pool. Pixels are cut into blocks, blocks into chunks, by the shape alone; a chunk is one
// sum in fp32, and chunks are added in ascending order. So the bits depend neither on the number of threads nor on how
// x and gy lie in memory.
void wgrad(const WgradProblem& problem);

}  // namespace effkern::conv
