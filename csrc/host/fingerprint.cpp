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

// Four independent multiply-xor chains: one chain would wait for its own multiplier at every step.
class Mixer {
 public:
  void add(uint64_t word) {
    uint64_t& lane = lanes_[next_++ & 3];
    lane = (lane ^ word) * 0x9E3779B97F4A7C15ull;  // 2^64 / golden ratio: odd, so no bit of the word is lost
    lane ^= lane >> 29;
  }

  void add_bytes(const unsigned char* data, int64_t bytes) {
    for (; bytes >= 8; data += 8, bytes -= 8) add(load(data, 8));
    if (bytes > 0) add(load(data, bytes));
  }

  static uint64_t load(const unsigned char* data, int64_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, data, static_cast<size_t>(bytes));
    return word;
  }

  int64_t finish() {
    Mixer all;
    for (uint64_t lane : lanes_) {
      all.next_ = 0;
      all.add(lane);
    }
    return static_cast<int64_t>(all.lanes_[0] >> 1);  // non-negative
  }

 private:
  uint64_t lanes_[4] = {1, 2, 3, 4};
  unsigned next_ = 0;
};

// `address` is the data pointer of a live tensor that spans `elements` elements of `element_size` bytes.
int64_t fingerprint(uintptr_t address, int64_t elements, int64_t element_size, bool full) {
  if (elements < 0) throw py::value_error("elements: must not be negative, got " + std::to_string(elements));
  if (element_size < 1 || element_size > 8)
    throw py::value_error("element_size: must be 1 to 8, got " + std::to_string(element_size));
  if (elements > 0 && address == 0) throw py::value_error("address: must not be null");
  const auto* data = reinterpret_cast<const unsigned char*>(address);
  const int64_t bytes = elements * element_size;
  Mixer mixer;
  mixer.add(static_cast<uint64_t>(bytes));
  if (full) {
    mixer.add_bytes(data, bytes);
    return mixer.finish();
  }
  // Odd, so that sampling walks over all residues of the power-of-two channel counts weights usually have.
  const int64_t step = (elements / kSamples) | 1;
  for (int64_t i = 0; i < elements; i += step) mixer.add(Mixer::load(data + i * element_size, element_size));
  const int64_t line = std::min(bytes, kCacheLine);
  mixer.add_bytes(data, line);
  mixer.add_bytes(data + bytes - line, line);
  return mixer.finish();
}

}  // namespace

void bind_fingerprint(py::module_& m) {
  m.def("fingerprint", &fingerprint, py::arg("address"), py::arg("elements"), py::arg("element_size"), py::arg("full"),
        "Hash the bits of the tensor at `address`: 256 samples and both ends, or all of it.");
}

}  // namespace effkern::host
