// Which algorithm runs a coded layer. Raw pointers only.
#pragma once

#include "decode.h"

namespace effkern::pq {

// How the dense arithmetic is done: on entries read where they lie in the book, on decoded panels by the convolution
// engine, or on tables of products of the entries.
enum class Algo { DecodeFma, Panel, Lut };

// Whether a layer can be run as a product of rows (decode_fma, lut): a 1x1 kernel, no padding, one group.
bool fits_rows(const conv::Problem& problem);
bool fits_lut(const conv::Problem& problem, const CodedMatrix& matrix);

// From one sample's shape and the types only: neither the number of samples nor that of threads changes the choice, so
// that a sample's result does not depend on either.
Algo choose(const conv::Problem& problem, const CodedMatrix& matrix);

// Pixels at the end of a sample's map that decode_fma takes over from lut, whose blocks of 8 they would leave almost
// empty.
int64_t left_to_dots(int64_t pixels);

}  // namespace effkern::pq
