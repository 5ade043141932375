// The instruction-set switch of _C.so, reached from _host.so: two libraries, one state, and it lives in _C.
#pragma once

#include <string>
#include <vector>

namespace effkern::host {

// A C function of _C.so by name.
void* symbol(const char* name);

// All of them throw std::runtime_error if _C.so, which lies next to this library, is not loaded.
std::string isa();
std::vector<std::string> available_isas();
void set_isa(const std::string& name);  // std::invalid_argument: unknown name, or not available on this processor

}  // namespace effkern::host
