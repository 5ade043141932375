// gz = gy where the activation let the value through, else 0: the gradient at the input of relu and relu6, told from
// their output.
#pragma once

#include "../conv/problem.h"

namespace effkern::conv {

// gy, y and gz have one shape, any strides; gz may be of another dtype than gy (the copy is exact, or widens).
void relu_grad(const Activation& gy, const Activation& y, Act act, const Activation& gz);

}  // namespace effkern::conv
