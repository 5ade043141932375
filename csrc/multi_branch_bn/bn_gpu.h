// What the GPU's kernels for y = relu(sum of batch_norm(x_i)) are given: maps as rows of channels, one a pixel.
#pragma once

#include <cstdint>

#include "../common/cuda/columns.h"
#include "../common/cuda/stream.h"

namespace effkern::multi_branch_bn::gpu {

using device::Global;

constexpr int kBranches = 4;  // the most of one call

template <class T>
struct Maps {
  device::Rows<const T> x[kBranches];
  int32_t count, channels;
  device::Slices slices;
  bool wide;  // 16-byte access to these and to what is written beside them
};

// One vector of channels a branch, fp32.
struct Vectors {
  Global<const float> of[kBranches];
};

// Of every branch, slice and channel the mean and the sum of squared deviations from it: [branch][slice][2][channels].
template <class T>
struct Statistics {
  Maps<T> maps;
  Global<float> parts;
};

// From the slices' statistics, or the running ones, to what the batch is normalised with. Tables are
// [branch][channels].
struct Finish {
  Global<const float> parts;  // null: not training
  device::Slices slices;
  int32_t count, channels;
  Vectors weight, bias, running_mean, running_var;  // the last two null: nothing is tracked
  double momentum, eps;
  Global<double> mean, invstd;
  Global<float> new_mean, new_var;  // null: not wanted
  Global<float> scale, shift;       // y = sum of scale * x + shift: a table and a vector
};

template <class T>
struct Apply {
  Maps<T> maps;
  Global<const float> scale, shift;
  device::Rows<T> y;
  bool relu;
};

// What gradients are made from: the affine form of the forward pass is made again from its statistics, so that the
// relu's mask is that of y.
template <class T>
struct Gradient {
  Maps<T> maps;
  device::Rows<const T> grad;
  Global<const double> mean, invstd;
  Vectors weight, bias;
  bool relu;
};

// Sums of g and of g * (x_i - mean_i) over the slices: [slice][1 + branches][channels].
template <class T>
struct GradientSums {
  Gradient<T> of;
  Global<float> parts;
};

// dweight and dbias, and the factors of x_i - mean_i and 1 in dx_i.
struct GradientFinish {
  Global<const float> parts;
  device::Slices slices;
  int32_t count, channels;
  Vectors weight;
  Global<const double> mean, invstd;
  Global<float> dweight, dbias;
  Global<float> slope, offset;  // tables
};

template <class T>
struct GradientApply {
  Gradient<T> of;
  Global<const float> slope, offset;
  bool training;                  // else dx is scale * g
  device::Rows<T> dx[kBranches];  // .at null: not wanted
};

// Each launches one kernel, allocates nothing and waits for nothing.
template <class T>
void run(const Statistics<T>& p, device::Stream stream);
void run(const Finish& p, device::Stream stream);
template <class T>
void run(const Apply<T>& p, device::Stream stream);
template <class T>
void run(const GradientSums<T>& p, device::Stream stream);
void run(const GradientFinish& p, device::Stream stream);
template <class T>
void run(const GradientApply<T>& p, device::Stream stream);

}  // namespace effkern::multi_branch_bn::gpu
