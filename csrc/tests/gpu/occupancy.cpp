// Blocks a multiprocessor holds, by NVIDIA's own header, for devices that are not here. Reads lines of
// "compute-capability registers threads shared-bytes" (80 128 256 49152) and answers each with the number of blocks.
#include <cuda_occupancy.h>

#include <cstdio>

namespace {

struct Part {
  int capability, warps, blocks, shared_kib;  // per multiprocessor; CUDA programming guide, technical specifications
};
constexpr Part kParts[] = {{80, 64, 32, 164}, {86, 48, 16, 100},  {89, 48, 24, 100},
                           {90, 64, 32, 228}, {100, 64, 32, 228}, {120, 48, 24, 100}};

int blocks(const Part& part, int registers, int threads, size_t shared) {
  cudaOccDeviceProp device;
  device.computeMajor = part.capability / 10;
  device.computeMinor = part.capability % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = part.warps * 32;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerMultiprocessor = static_cast<size_t>(part.shared_kib) << 10;
  device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - 1024;
  device.reservedSharedMemPerBlock = 1024;
  device.numSms = 1;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = static_cast<int>(device.sharedMemPerBlockOptin);
  kernel.numBlockBarriers = 1;
  const cudaOccDeviceState state;
  cudaOccResult result;
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -static_cast<int>(error);
}

}  // namespace

int main() {
  int capability, registers, threads;
  size_t shared;
  while (std::scanf("%d %d %d %zu", &capability, &registers, &threads, &shared) == 4) {
    int answer = -1000;
    for (const Part& part : kParts)
      if (part.capability == capability) answer = blocks(part, registers, threads, shared);
    std::printf("%d\n", answer);
  }
}
