// A hash of the bits of a weight, sampled or whole: tells a cache of packed weights that the weight was edited.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace effkern::host {

// Hash of `elements` elements of `element_size` (1 to 8) bytes that lie at `address`.
int64_t fingerprint_bits(const void* address, int64_t elements, int64_t element_size, bool full);

// Adds fingerprint(address, elements, element_size, full) to the module.
void bind_fingerprint(pybind11::module_& m);

}  // namespace effkern::host
