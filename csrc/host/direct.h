// Calls of ops past torch's dispatcher, and the stamps that say whether a weight's pack is still true.
#pragma once

#include <pybind11/pybind11.h>

namespace effkern::host {

void bind_direct(pybind11::module_& m);

}  // namespace effkern::host
