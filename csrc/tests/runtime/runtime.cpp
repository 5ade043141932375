#include "runtime.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../simt/launch.h"
#include "../simt/memory.h"

namespace effkern::test::runtime {
namespace {

constexpr int kSharedByDefault = 48 << 10, kSharedOfProcessor = 228 << 10, kThreadsOfProcessor = 2048;

struct Block {
  size_t bytes;
  std::unique_ptr<simt::Memory> memory;
};

struct State {
  int streams = 0;
  int processors = 2, most_shared = 99 << 10;
  cudaError_t last = cudaSuccess;
  int64_t calls = 0, fails_at = -1;
  std::map<std::pair<const void*, int>, int> shared;  // allowed to a kernel on a device
  std::map<char*, Block> blocks;
  std::vector<std::string> log;
  std::string text;
  bool running = true, waits = true, capturing = false;
  int elsewhere = 0;
  uint32_t seed = 0;
  std::vector<std::function<void()>> graph;
  std::vector<void*> kept;
};

// A thread's own, as CUDA's are: gradients are computed by threads of torch.
thread_local int device_now = 0, stream_now[kDevices] = {};

State& state() {
  static State* s = new State;  // torch gives memory back to the very end
  return *s;
}

cudaError_t refuse(cudaError_t error) { return state().last = error; }

// Counts a call that may fail; says whether this one shall.
bool fails() { return state().calls++ == state().fails_at; }

template <class... Parts>
void write(const char* call, const Parts&... parts) {
  std::ostringstream line;
  line << "{\"call\": \"" << call << "\", \"device\": " << device_now;
  (line << ... << parts);
  line << "}";
  state().log.push_back(line.str());
}

int allowed(const void* kernel) {
  const auto found = state().shared.find({kernel, device_now});
  return found == state().shared.end() ? kSharedByDefault : found->second;
}

// Device and number of a stream; 0 is the default stream of whatever device is the current one.
std::pair<int, int> stream_of(cudaStream_t stream) {
  const auto bits = reinterpret_cast<intptr_t>(stream);
  return bits == 0 ? std::pair(device_now, 0) : std::pair(int(bits >> 32) - 1, int(bits & 0xffffffff));
}

}  // namespace

int current_device() { return device_now; }
void set_device(int device) {
  if (device < 0 || device >= kDevices) throw std::runtime_error("no such device");
  device_now = device;
}

int current_stream(int device) { return stream_now[device]; }
void set_stream(int device, int stream) { stream_now[device] = stream; }
int new_stream() { return ++state().streams; }
cudaStream_t handle(int device, int stream) {
  if (stream == 0) return nullptr;
  return reinterpret_cast<cudaStream_t>((intptr_t{device} + 1) << 32 | stream);
}

void* allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  auto* data = static_cast<char*>(std::aligned_alloc(512, (bytes + 511) / 512 * 512));
  std::memset(data, 0xff, bytes);
  state().blocks[data] = {bytes, nullptr};
  return data;
}
void give_back(void* memory) {
  if (memory == nullptr) return;
  if (state().capturing) {
    state().kept.push_back(memory);
    return;
  }
  state().blocks.erase(static_cast<char*>(memory));
  std::free(memory);
}

void work(std::function<void()> what) {
  if (state().elsewhere > 0)
    what();
  else if (state().capturing)
    state().graph.push_back(std::move(what));
  else if (state().running)
    what();
}
void wait(const std::string& what) {
  if (state().elsewhere > 0 || (state().waits && !state().capturing)) return;
  throw std::runtime_error("the host would wait for the device: " + what);
}
Elsewhere::Elsewhere(const std::string& op) {
  if (state().capturing) throw std::runtime_error(op + " runs on the CPU here and cannot be captured");
  ++state().elsewhere;
}
Elsewhere::~Elsewhere() { --state().elsewhere; }
void note(const std::string& op) { write("torch", ", \"op\": \"", op, "\""); }

cudaError_t launch(const Launch& l) {
  if (fails()) return refuse(cudaErrorMemoryAllocation);
  const auto [device, stream] = stream_of(l.stream);
  const int64_t threads = int64_t{l.block.x} * l.block.y * l.block.z;
  if (device != device_now) return refuse(cudaErrorInvalidResourceHandle);
  if (threads < 1 || threads > 1024 || l.grid.x < 1 || l.grid.x > INT32_MAX || l.grid.y != 1 || l.grid.z != 1)
    return refuse(cudaErrorInvalidConfiguration);
  if (l.shared > static_cast<size_t>(allowed(l.kernel))) return refuse(cudaErrorInvalidValue);
  write("launch", ", \"kernel\": ", reinterpret_cast<uintptr_t>(l.kernel), ", \"grid\": ", l.grid.x,
        ", \"threads\": ", threads, ", \"shared\": ", l.shared, ", \"stream\": ", stream);
  work([l] {
    const simt::Report report = simt::run(
        {.grid = l.grid.x, .threads = static_cast<int>(l.block.x), .shared = l.shared, .seed = state().seed++}, l.body);
    if (!report.ok()) throw std::runtime_error(report.what);
  });
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (fails()) return refuse(cudaErrorMemoryAllocation);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > state().most_shared)
    return refuse(cudaErrorInvalidValue);
  state().shared[{kernel, device_now}] = value;
  write("attribute", ", \"kernel\": ", reinterpret_cast<uintptr_t>(kernel), ", \"shared\": ", value);
  return cudaSuccess;
}

// By shared memory and threads; registers are the static checks' business.
cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared) {
  if (fails()) return refuse(cudaErrorMemoryAllocation);
  if (threads < 1 || threads > 1024) return refuse(cudaErrorInvalidValue);
  const size_t each = shared + 1024;
  const bool fits = shared <= static_cast<size_t>(allowed(kernel));
  *blocks = fits ? std::min<int>(kThreadsOfProcessor / threads, static_cast<int>(kSharedOfProcessor / each)) : 0;
  write("occupancy", ", \"kernel\": ", reinterpret_cast<uintptr_t>(kernel), ", \"shared\": ", shared);
  return cudaSuccess;
}

}  // namespace effkern::test::runtime

namespace effkern::test::simt {

// For pointers that host code as it ships hands to kernels (device.h).
Memory* memory_at(const void* data) {
  const auto* at = static_cast<const char*>(data);
  auto& blocks = runtime::state().blocks;
  auto found = blocks.upper_bound(const_cast<char*>(at));
  if (found == blocks.begin()) return nullptr;
  --found;
  auto& [base, block] = *found;
  if (at > base + block.bytes) return nullptr;
  if (!block.memory) block.memory = std::make_unique<Memory>("a tensor's storage", base, block.bytes, 1);
  return block.memory.get();
}

}  // namespace effkern::test::simt

using effkern::test::runtime::fails;
using effkern::test::runtime::kDevices;
using effkern::test::runtime::refuse;
using effkern::test::runtime::state;

cudaError_t cudaGetLastError() { return std::exchange(state().last, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
  }
  return "unrecognized error code";
}
cudaError_t cudaGetDevice(int* device) {
  if (fails()) return refuse(cudaErrorMemoryAllocation);
  *device = effkern::test::runtime::current_device();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (fails()) return refuse(cudaErrorMemoryAllocation);
  if (device < 0 || device >= kDevices) return refuse(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrMultiProcessorCount ? state().processors : state().most_shared;
  return cudaSuccess;
}

// For tests/gpu/stub.py.
extern "C" {
#define EFFKERN_TEST_API __attribute__((visibility("default")))
// Forgets the log and what was to fail.
EFFKERN_TEST_API void stub_begin(bool running, bool waits) {
  auto& s = state();
  s.log.clear(), s.calls = 0, s.fails_at = -1, s.running = running, s.waits = waits;
}
EFFKERN_TEST_API void stub_fail(int64_t call) { state().fails_at = call; }
EFFKERN_TEST_API int64_t stub_calls() { return state().calls; }
EFFKERN_TEST_API int stub_last_error() { return state().last; }
EFFKERN_TEST_API void stub_leave_error() { refuse(cudaErrorInvalidValue); }
EFFKERN_TEST_API int stub_take_error() { return cudaGetLastError(); }
EFFKERN_TEST_API int64_t stub_blocks() { return static_cast<int64_t>(state().blocks.size()); }
EFFKERN_TEST_API void stub_device(int processors, int most_shared) {
  auto& s = state();
  s.processors = processors, s.most_shared = most_shared;
  s.shared.clear();
}
EFFKERN_TEST_API const char* stub_log() {
  auto& s = state();
  s.text = "[";
  for (const std::string& line : s.log) s.text += (s.text.size() > 1 ? ", " : "") + line;
  return (s.text += "]").c_str();
}
EFFKERN_TEST_API void stub_capture(bool on) {
  auto& s = state();
  s.capturing = on;
  if (on) s.graph.clear();
}
EFFKERN_TEST_API void stub_replay() {
  for (const auto& work : state().graph) work();
}
}
