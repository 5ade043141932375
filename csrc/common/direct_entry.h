// The _C.so side of direct.h: tensors as views, and no exception past the C boundary.
#pragma once

#include <exception>

#include "direct.h"
#include "tensor.h"

#define EFFKERN_EXPORT extern "C" __attribute__((visibility("default")))

namespace effkern::direct {

inline View view(const TensorRef& t) {
  return {t.data, static_cast<ScalarType>(t.type), {t.sizes, static_cast<size_t>(t.dim)}, t.strides, true, t.capacity};
}

inline MaybeView maybe_view(const TensorRef& t) { return t.data == nullptr ? MaybeView() : MaybeView(view(t)); }

struct GaveUp : std::exception {};

// Calls body(make), where make(layout, type) returns the output's memory.
template <class Body>
int entry(const Output& output, const Body& body) {
  try {
    body([&](const Layout& layout, ScalarType type) {
      void* memory = output.make(output.context, layout.size, layout.stride, static_cast<int32_t>(type));
      if (memory == nullptr) throw GaveUp();
      return memory;
    });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace effkern::direct
