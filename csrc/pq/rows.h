// Coded weights applied to rows of numbers - the pixels of a 1x1 convolution, the rows of a linear layer - without
// decoding a panel. Raw pointers only.
#pragma once

#include "decode.h"

namespace effkern::pq {

// The rows are output pixels [begin, end), in raster order, of all samples of a problem with a 1x1 kernel, no padding,
// one group, no lists, no residual and no table of epilogue rows. A row's result depends on nothing but the row.
struct Rows {
  const conv::Problem& problem;
  int64_t begin, end;
  int64_t count() const { return problem.count * (end - begin); }
};

// decode_fma: an output is a sum of products of entries, read where they lie in the book, with the input. Every output
// has 8 partial sums over columns l, l + 8, ... of the whole sub-vectors, added up in a fixed order, then the columns
// left over one after the other: the same order however many rows there are.
void run_dots(const Rows& rows, const Decoder& decoder);

// lut: for 8 rows at a time the products of every entry with a sub-vector of the input, as a table; an output then adds
// up the table rows that its codes name, in the order of the positions. One stage, at most kTableEntries entries.
void run_lut(const Rows& rows, const Decoder& decoder);

}  // namespace effkern::pq
