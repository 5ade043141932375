// Whole samples of 4-d tensors by row list: copying and blending. Raw pointers only.
#pragma once

#include <cstdint>

#include "../conv/problem.h"

namespace effkern::block_skip {

// [n][h][w][c] fp32 at `data`.
conv::Activation nhwc(float* data, int64_t n, int64_t c, int64_t h, int64_t w);

// The samples from `begin` on.
conv::Activation from_sample(const conv::Activation& t, int64_t begin);

// to[to_rows[i]] = from[from_rows[i]] for i < count; null lists mean i. Of equal dtype the bits are copied, NaN
// payloads included; otherwise the value is converted.
void copy_rows(const conv::Activation& from, const int64_t* from_rows, const conv::Activation& to,
               const int64_t* to_rows, int64_t count);

// y[rows[i]] = gate[i] * z[i] + (1 - gate[i]) * old[rows[i]], computed in fp32. y may be old.
void blend_rows(const conv::Activation& z, const float* gate, const conv::Activation& old, const conv::Activation& y,
                const int64_t* rows, int64_t count);

}  // namespace effkern::block_skip
