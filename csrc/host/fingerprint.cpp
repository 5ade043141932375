#include "fingerprint.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

namespace py = pybind11;

namespace effkern::host {
namespace {

constexpr int64_t kSamples = 256;
constexpr int64_t kCacheLine = 64;

uint64_t load(const unsigned char* data, int64_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, data, static_cast<size_t>(bytes));
  return word;
}

// One step of the hash. Both factors are odd and both steps invertible, so a changed word always changes the lane.
uint64_t mix(uint64_t lane, uint64_t word) {
  lane = (lane ^ word) * 0x9E3779B97F4A7C15ull;  // 2^64 / golden ratio
  return lane ^ (lane >> 29);
}

// Words 0, 1, .. of a sequence, spread over four lanes: one lane would wait for its own multiplier at every step.
template <class Word>
uint64_t hash(int64_t count, const Word& word) {
  uint64_t a = 1, b = 2, c = 3, d = 4;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    a = mix(a, word(i));
    b = mix(b, word(i + 1));
    c = mix(c, word(i + 2));
    d = mix(d, word(i + 3));
  }
  for (; i < count; ++i) a = mix(a, word(i));
  return mix(mix(mix(a, b), c), d);
}

uint64_t hash_bytes(const unsigned char* data, int64_t bytes) {
  const int64_t words = (bytes + 7) / 8;
  return hash(words, [=](int64_t i) { return load(data + 8 * i, std::min<int64_t>(8, bytes - 8 * i)); });
}

uint64_t hash_samples(const unsigned char* data, int64_t elements, int64_t size) {
  // Odd, so that sampling walks over all residues of the power-of-two channel counts weights usually have.
  const int64_t step = (elements / kSamples) | 1;
  const int64_t count = (elements + step - 1) / step;
  if (size == 4) return hash(count, [=](int64_t i) { return load(data + 4 * i * step, 4); });
  return hash(count, [=](int64_t i) { return load(data + size * i * step, size); });
}

// `address` is the data pointer of a live tensor that spans `elements` elements of `element_size` bytes.
int64_t checked_fingerprint(uintptr_t address, int64_t elements, int64_t element_size, bool full) {
  if (elements < 0) throw py::value_error("elements: must not be negative, got " + std::to_string(elements));
  if (element_size < 1 || element_size > 8)
    throw py::value_error("element_size: must be 1 to 8, got " + std::to_string(element_size));
  if (elements > 0 && address == 0) throw py::value_error("address: must not be null");
  return fingerprint_bits(reinterpret_cast<const void*>(address), elements, element_size, full);
}

}  // namespace

int64_t fingerprint_bits(const void* address, int64_t elements, int64_t element_size, bool full) {
  const auto* data = static_cast<const unsigned char*>(address);
  const int64_t bytes = elements * element_size;
  uint64_t result = mix(0, static_cast<uint64_t>(bytes));
  if (full) {
    result = mix(result, hash_bytes(data, bytes));
  } else {
    const int64_t line = std::min(bytes, kCacheLine);
    result = mix(result, hash_samples(data, elements, element_size));
    result = mix(result, hash_bytes(data, line));
    result = mix(result, hash_bytes(data + bytes - line, line));
  }
  return static_cast<int64_t>(result >> 1);  // non-negative
}

void bind_fingerprint(py::module_& m) {
  m.def("fingerprint", &checked_fingerprint, py::arg("address"), py::arg("elements"), py::arg("element_size"),
        py::arg("full"), "Hash the bits of the tensor at `address`: 256 samples and both ends, or all of it.");
}

}  // namespace effkern::host
