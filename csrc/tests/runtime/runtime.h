// A CUDA device that is not there: its runtime's state, and what torch's side of it (device.cpp) shares with the calls
// of cuda_runtime.h.
//
// Calls are checked as CUDA documents them, written to a log, and any one of them may be made to fail. Work (launches,
// copies, fills) is done at once in the harness, left out, or kept while a graph is captured. Whatever would wait for
// the device throws where the test forbids it, and always while a graph is captured.
#pragma once

#include <functional>
#include <string>

#include "cuda_runtime.h"

namespace effkern::test::runtime {

constexpr int kDevices = 2;

int current_device();
void set_device(int device);

// The number of the stream that is torch's current one on a device; 0 is the default stream.
int current_stream(int device);
void set_stream(int device, int stream);
int new_stream();
cudaStream_t handle(int device, int stream);

// Memory of the device, filled with NaN. What is given back while a graph is captured stays the graph's.
void* allocate(size_t bytes);
void give_back(void* memory);

// Does work in order, or keeps it for the graph.
void work(std::function<void()> what);
// Throws where waiting is forbidden.
void wait(const std::string& what);

// While one lives waiting is allowed: an operator of torch's own, done on the CPU in place of the device.
class Elsewhere {
 public:
  explicit Elsewhere(const std::string& op);
  ~Elsewhere();
  Elsewhere(const Elsewhere&) = delete;
  Elsewhere& operator=(const Elsewhere&) = delete;
};

// An operator of torch that ran on the device.
void note(const std::string& op);

}  // namespace effkern::test::runtime
