// A depthwise and the pointwise convolution behind it as one pass, or these two and the one in front of them, as in an
// inverted residual or behind a stem: the maps between them never leave the L2 cache.
#pragma once

#include "problem.h"

namespace effkern::conv {

// True if the pair runs fused: channels-last fp32 in and out, and enough rows to share them evenly among the threads.
// `depthwise.y` tells the size of the maps between and has no data; `pointwise.x` is not looked at. `threads` as in
// run().
bool can_fuse(const Problem& depthwise, const Problem& pointwise, int64_t threads = 0);

// Gives the bits that running one after the other gives. Both problems have the same count and lists; the rows of
// tables are those of the depthwise problem's x.
void run_fused(const Problem& depthwise, const Problem& pointwise, int64_t threads = 0);

// The same with the convolution whose result is `depthwise.x`, which needs no data either: true where that result is
// larger than a cache, and none of the three has lists, rows of tables or, but for the last, a residual.
bool can_fuse(const Problem& front, const Problem& depthwise, const Problem& pointwise);

// Gives the bits that running one after the other gives.
void run_fused(const Problem& front, const Problem& depthwise, const Problem& pointwise);

// Either as a step of a longer work, cut for `threads` threads; `front` may be null. The problems must outlive it.
Step fused_step(const Problem* front, const Problem& depthwise, const Problem& pointwise, int64_t threads);

}  // namespace effkern::conv
