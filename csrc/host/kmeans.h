// The two steps of k-means on plain arrays: nearest entry of a book, and means of the clusters.
#pragma once

#include <cstdint>

namespace effkern::host {

// codes[i] = argmin_k |x[i] - book[k]|^2, the lowest k among equals; distance (nullable) receives the minimum.
// x [n, d], book [k, d], both dense. Rows are independent: the result does not depend on threads.
void assign(const float* x, const float* book, int64_t n, int64_t k, int64_t d, int threads, int64_t* codes,
            float* distance);

// mean[j] = mean of the rows of x with codes == j, summed in double in row order; rows of an empty cluster are 0.
// codes must lie in [0, k).
void update(const float* x, const int64_t* codes, int64_t n, int64_t k, int64_t d, float* mean, int64_t* counts);

}  // namespace effkern::host
