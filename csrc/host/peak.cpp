#include "peak.h"

#include <chrono>

namespace effkern::host {
namespace {

constexpr int kSteps = 4096;

// Independent accumulators hide the latency of the unit and still fit the registers of the instruction set. Always
// inlined into one function per set, which is what gives it its instructions.
template <int kBytes, int kChains>
__attribute__((always_inline)) inline float chains(float seed) {
  typedef float Vector __attribute__((vector_size(kBytes)));
  Vector sum[kChains], factor = Vector{} + seed;
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) sum[c] = Vector{} + static_cast<float>(c);
  for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      sum[c] = sum[c] * factor + factor;
      __asm__ volatile("" : "+v"(sum[c]));  // keeps the chain from being folded
    }
  }
  float total = 0;
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) total += sum[c][0];
  return total;
}

constexpr int kScalarChains = 12, kAvx2Chains = 12, kAvx512Chains = 16;
float scalar_chains(float seed) { return chains<16, kScalarChains>(seed); }
__attribute__((target("avx2,fma"))) float avx2_chains(float seed) { return chains<32, kAvx2Chains>(seed); }
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) float avx512_chains(float seed) {
  return chains<64, kAvx512Chains>(seed);
}

}  // namespace

double fma_peak(double seconds, const std::string& isa) {
  using clock = std::chrono::steady_clock;
  float (*run)(float) = isa == "avx512" ? avx512_chains : isa == "avx2" ? avx2_chains : scalar_chains;
  const double lanes = isa == "avx512" ? 16 : isa == "avx2" ? 8 : 4;
  const double chains = isa == "avx512" ? kAvx512Chains : isa == "avx2" ? kAvx2Chains : kScalarChains;
  volatile float sink = run(0.25F);  // wakes the unit before the clock starts
  const clock::time_point begin = clock::now();
  double rounds = 0, passed = 0;
  do {
    for (int i = 0; i < 8; ++i) sink = sink + run(0.25F);
    rounds += 8;
    passed = std::chrono::duration<double>(clock::now() - begin).count();
  } while (passed < seconds);
  return rounds * kSteps * chains * lanes * 2 / passed * 1e-9;
}

}  // namespace effkern::host
