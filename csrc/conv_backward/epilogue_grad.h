// The gradient on its way back through act(z * scale + shift), for samples with their own numbers of channels and rows
// of the tables. Raw pointers only.
#pragma once

#include "../conv/problem.h"

namespace effkern::conv {

struct EpilogueGrad {
  Activation gy;            // at the output
  Activation y;             // the output, which tells the clipped regions of relu and relu6; not read for others
  Activation z;             // fp32: what the epilogue was given; null: neither hardswish, silu nor sums_z are asked for
  Activation g;             // fp32, channels side by side, to be written: the gradient at z
  const int64_t* channels;  // [n]: channels from there on are neither read nor written
  Act act = Act::None;
  const float* scale = nullptr;  // tables as in Epilogue
  const float* shift = nullptr;
  int64_t table_stride = 0;
  const int32_t* table_row = nullptr;
  // Sums over the map of every channel of every sample, [n][c], or null: of the gradient g' at shift, and of g' * z,
  // the gradient at scale. Zero where a sample has no channel.
  double* sums = nullptr;
  double* sums_z = nullptr;
};

// Runs on all threads of the pool; a sample's result depends on nothing else.
void epilogue_grad(const EpilogueGrad& problem);

}  // namespace effkern::conv
