// Launching kernels from host code: every launch is checked, and a failure is a Python RuntimeError that names the
// kernel.
#pragma once

#include "../check.h"
#include "device.cuh"
#include "stream.h"

#if defined(EFFKERN_SIMT) && !defined(EFFKERN_RUNTIME)
#include "../../tests/simt/host_launch.h"
#else
#include "runtime.cuh"
#endif
