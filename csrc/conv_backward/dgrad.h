// Gradient of a convolution in its input, as convolutions with the transposed, flipped weight on the forward engine.
// Raw pointers only.
#pragma once

#include "../conv/pack.h"
#include "../conv/problem.h"

namespace effkern::conv {

struct DgradProblem {
  Activation gy, gx;  // channels past c_out of gy and past c_in of gx are never touched
  // Listed samples: listed sample i reads gy sample gy_rows[i] and writes gx sample gx_rows[i]; null = i.
  int64_t count = 0;
  const int64_t* gy_rows = nullptr;
  const int64_t* gx_rows = nullptr;
  WeightView weight;  // the running part, as for the forward convolution
  int64_t stride[2] = {1, 1}, pad[2] = {0, 0}, dil[2] = {1, 1};
  Algo algo = Algo::Auto;
};

// Runs on all threads of the pool; batch- and thread-invariant like conv::run. Stride s is done as s x s convolutions
// of stride 1, one for each residue of the input position: the taps that meet it are every s-th (by dilation d, every s
// / gcd(s, d)-th), and no product with an inserted zero is formed.
void dgrad(const DgradProblem& problem);

}  // namespace effkern::conv
