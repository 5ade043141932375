// A hash of the bits of a weight, sampled or whole: tells a cache of packed weights that the weight was edited.
#pragma once

#include <pybind11/pybind11.h>

namespace effkern::host {

// Adds fingerprint(address, elements, element_size, full) to the module.
void bind_fingerprint(pybind11::module_& m);

}  // namespace effkern::host
