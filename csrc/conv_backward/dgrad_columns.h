// The gradient in an input of few channels, such as an image, as a product and a sum over windows.
#pragma once

#include "dgrad.h"

namespace effkern::conv {

// Whether dgrad_columns is the faster way. Looks at one sample only, so that a sample's bits do not depend on the
// batch.
bool takes_columns(const DgradProblem& problem);

// A panel of the engine holds 16 outputs, of which an RGB image uses 3. Here all taps of all input channels are the
// outputs of one 1x1 convolution of gy; every input then adds up what the taps that meet it gave, in ascending order of
// tap rows, outputs and taps. Batch- and thread-invariant like dgrad.
void dgrad_columns(const DgradProblem& problem);

}  // namespace effkern::conv
