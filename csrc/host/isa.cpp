#include "isa.h"

#include <dlfcn.h>

#include <stdexcept>

namespace effkern::host {

// torch loads _C.so with local symbols, so it has to be found by its path; NOLOAD: never bring in a second copy.
void* symbol(const char* name) {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&symbol), &self) == 0) throw std::runtime_error("cannot find the path of _host");
  const std::string path(self.dli_fname);
  const std::string library = path.substr(0, path.rfind('/') + 1) + "_C.so";
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr)
    throw std::runtime_error(
        "effkern._C is not loaded: import effkern first; `python -m effkern.info` tells why it may be missing");
  void* found = dlsym(handle, name);
  dlclose(handle);  // drops the reference dlopen added; the library stays, torch holds it
  if (found == nullptr)
    throw std::runtime_error(std::string("effkern._C has no ") + name + ": the two were not built together");
  return found;
}

namespace {

const char* const kNames[] = {"scalar", "avx2", "avx512"};
constexpr int kSets = 3;

}  // namespace

std::string isa() {
  const int which = reinterpret_cast<int (*)()>(symbol("effkern_isa"))();
  if (which < 0 || which >= kSets)
    throw std::runtime_error("EFFKERN_ISA names an instruction set this processor lacks");
  return kNames[which];
}

std::vector<std::string> available_isas() {
  const auto available = reinterpret_cast<int (*)(int)>(symbol("effkern_isa_available"));
  std::vector<std::string> names;
  for (int i = 0; i < kSets; ++i)
    if (available(i) != 0) names.emplace_back(kNames[i]);
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (const std::string& candidate : available_isas()) known += (known.empty() ? "" : ", ") + candidate;
  for (int i = 0; i < kSets; ++i)
    if (name == kNames[i] && reinterpret_cast<int (*)(int)>(symbol("effkern_set_isa"))(i) == 0) return;
  throw std::invalid_argument("name: must be one of " + known + " on this processor, got '" + name + "'");
}

}  // namespace effkern::host
