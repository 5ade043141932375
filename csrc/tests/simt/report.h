// What a run of a kernel in the harness tells: the first fault, if any, and what the memory accesses cost.
#pragma once

#include <cstdint>
#include <map>
#include <source_location>
#include <string>

namespace effkern::test::simt {

using Site = std::source_location;

enum class Fault {
  None,
  Race,           // two accesses, one of them a write, that no barrier orders
  InFlight,       // a byte touched between the issue of an asynchronous copy to it and the wait that ends the copy
  OutOfBounds,    // outside of the buffer the pointer was made from
  Forbidden,      // inside, but the test said that the kernel has no business there
  Uninitialized,  // shared memory that no one wrote
  Misaligned,
  Divergence,  // threads of one barrier or warp operation at different places, or a lane that is not there
  Deadlock,
  Leak,   // a thread ended with asynchronous copies it did not wait for
  Limit,  // more switches than any correct kernel of a test makes: a loop without end
};

inline const char* name(Fault fault) {
  constexpr const char* names[] = {"none",      "race",          "in flight",  "out of bounds",
                                   "forbidden", "uninitialized", "misaligned", "divergence",
                                   "deadlock",  "leak",          "limit"};
  return names[static_cast<int>(fault)];
}

enum class Op { LoadGlobal, StoreGlobal, LoadShared, StoreShared, LoadMatrix, AsyncCopy, AsyncCopyShared };

// Sums over warp-wide instructions. A wavefront is one pass over the 32 banks of shared memory, a sector 32 bytes of
// global memory; `least` is what the same bytes need when they are laid out best. `asked` counts what several lanes
// want for each of them, `bytes` once.
struct Cost {
  int64_t instructions = 0, bytes = 0, passes = 0, least = 0, bytes_per_lane = 0, asked = 0;
};

struct Report {
  Fault fault = Fault::None;
  std::string what;         // empty when all went well; names the seed, the thread, the block and the lines
  std::map<Op, Cost> cost;  // only with Launch::counters
  std::map<std::pair<Op, unsigned>, Cost> lines;  // the same by line of the kernel's source
  int64_t mma = 0;                                // tensor core instructions, a warp each
  int64_t switches = 0;
  bool ok() const { return fault == Fault::None; }
};

}  // namespace effkern::test::simt
