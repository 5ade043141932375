// Rows of a map copied to fp32, channels side by side.
#pragma once

#include "../conv/problem.h"

namespace effkern::conv {

// 4 rows of 4, `from_step` apart, become 4 columns: rows `pitch` apart in the copy.
void transpose(const float* from, int64_t from_step, float* to, int64_t pitch);

// Copies channels [c, c + channels) of the first `columns` pixels of row y of sample n to out[column][pitch]; channels
// past the end, up to `padded`, become 0.
void stage_row(const Activation& t, int64_t n, int64_t y, int64_t columns, int64_t c, int64_t channels, int64_t padded,
               int64_t pitch, float* out);

}  // namespace effkern::conv
