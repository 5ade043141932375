// The device vocabulary (device.cuh) for nvcc, sm_80 and later.
#pragma once

#include <cstdint>
#include <type_traits>

namespace effkern::device {

// ---- where am I
__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ unsigned block() { return blockIdx.x; }
__device__ __forceinline__ unsigned blocks() { return gridDim.x; }

// ---- pointers that only the functions below follow
template <class T>
struct Global {
  T* p = nullptr;

  Global() = default;
  __host__ __device__ Global(T* p) : p(p) {}
  template <class U>
    requires std::is_same_v<T, const U>
  __host__ __device__ Global(Global<U> other) : p(other.p) {}
  __host__ __device__ explicit operator bool() const { return p != nullptr; }
  __host__ __device__ __forceinline__ Global operator+(int64_t i) const { return {p + i}; }
  template <class U>
  __host__ __device__ __forceinline__ Global<U> as() const {
    return {reinterpret_cast<U*>(p)};
  }
};

template <class T>
struct Shared {
  int32_t at = 0;  // bytes from the start of the block's shared memory
  __device__ __forceinline__ Shared operator+(int i) const { return {at + i * static_cast<int>(sizeof(T))}; }
  template <class U>
  __device__ __forceinline__ Shared<U> as() const {
    return {at};
  }
};

__device__ __forceinline__ Shared<char> shared_memory() { return {0}; }

namespace detail {
extern __shared__ __align__(1024) char arena[];
__device__ __forceinline__ uint32_t shared_address(int32_t at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(arena)) + static_cast<uint32_t>(at);
}

// The machine type of V's width: a struct of halves would be moved half by half.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class To, class From>
__device__ __forceinline__ To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace detail

// A load of constant memory goes the read-only way.
template <class V, class T>
__device__ __forceinline__ V load(Global<T> from) {
  using W = typename detail::Word<sizeof(V)>::type;
  if constexpr (std::is_const_v<T>)
    return detail::cast<V>(__ldg(reinterpret_cast<const W*>(from.p)));
  else
    return detail::cast<V>(*reinterpret_cast<const W*>(from.p));
}
template <class V, class T>
__device__ __forceinline__ void store(Global<T> to, V value) {
  using W = typename detail::Word<sizeof(V)>::type;
  *reinterpret_cast<W*>(to.p) = detail::cast<W>(value);
}
// The 16-byte forms are spelled out: where the compiler cannot see the alignment of an address that it computes itself,
// it takes a vector of shared memory apart into words.
template <class V, class T>
__device__ __forceinline__ V load(Shared<T> from) {
  using W = typename detail::Word<sizeof(V)>::type;
  if constexpr (sizeof(V) == 16) {
    uint4 w;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "r"(detail::shared_address(from.at))
                 : "memory");
    return detail::cast<V>(w);
  } else if constexpr (std::is_same_v<V, uint32_t>) {
    return *reinterpret_cast<const W*>(detail::arena + from.at);  // cast() may become loads of bytes
  } else {
    return detail::cast<V>(*reinterpret_cast<const W*>(detail::arena + from.at));
  }
}
template <class V, class T>
__device__ __forceinline__ void store(Shared<T> to, V value) {
  using W = typename detail::Word<sizeof(V)>::type;
  const W w = detail::cast<W>(value);
  if constexpr (sizeof(V) == 16)
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(detail::shared_address(to.at)), "r"(w.x), "r"(w.y),
                 "r"(w.z), "r"(w.w)
                 : "memory");
  else
    *reinterpret_cast<W*>(detail::arena + to.at) = w;
}
__device__ __forceinline__ int32_t atomic_add(Global<int32_t> at, int32_t value) { return atomicAdd(at.p, value); }

// ---- asynchronous copies, past L1: every byte is used once a block
template <class T>
__device__ __forceinline__ void copy_async16(Shared<char> to, Global<T> from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(to.at)),
               "l"(__cvta_generic_to_global(from.p)), "r"(bytes)
               : "memory");
}
// All 16 bytes or zeros. Cheaper than a byte count, which costs three instructions of address arithmetic.
template <class T>
__device__ __forceinline__ void copy_async16_if(bool valid, Shared<char> to, Global<T> from) {
  asm volatile(
      "{\n .reg .pred skip;\n setp.eq.u32 skip, %2, 0;\n"
      " cp.async.cg.shared.global [%0], [%1], 16, skip;\n}" ::"r"(detail::shared_address(to.at)),
      "l"(__cvta_generic_to_global(from.p)), "r"(static_cast<uint32_t>(valid))
      : "memory");
}
// No copy at all where it is not wanted: a predicate, and no branch.
template <class T>
__device__ __forceinline__ void copy_async16_where(bool wanted, Shared<char> to, Global<T> from) {
  asm volatile(
      "{\n .reg .pred wanted;\n setp.ne.u32 wanted, %2, 0;\n"
      " @wanted cp.async.cg.shared.global [%0], [%1], 16;\n}" ::"r"(detail::shared_address(to.at)),
      "l"(__cvta_generic_to_global(from.p)), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// ---- barriers and warp operations
__device__ __forceinline__ void sync() { __syncthreads(); }
__device__ __forceinline__ void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ void sync_warp(uint32_t mask = kAllLanes) { __syncwarp(mask); }
__device__ __forceinline__ uint32_t ballot(bool vote, uint32_t mask = kAllLanes) { return __ballot_sync(mask, vote); }
template <class T>
__device__ __forceinline__ T shuffle(T value, int from, uint32_t mask = kAllLanes) {
  return __shfl_sync(mask, value, from);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int bits, uint32_t mask = kAllLanes) {
  return __shfl_xor_sync(mask, value, bits);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T value, int by, uint32_t mask = kAllLanes) {
  return __shfl_down_sync(mask, value, by);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int by, uint32_t mask = kAllLanes) {
  return __shfl_up_sync(mask, value, by);
}
// Over the lanes, for each of them.
__device__ __forceinline__ uint32_t reduce_max(uint32_t value) { return __reduce_max_sync(kAllLanes, value); }
__device__ __forceinline__ uint32_t reduce_add(uint32_t value) { return __reduce_add_sync(kAllLanes, value); }

// ---- tensor cores
// Four 8x8 matrices of 16-bit (or 8x4 of 32-bit) elements; lane l gives the address of row l % 8 of matrix l / 8 and
// gets word l % 4 of row l / 4 of each.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&to)[4], Shared<char> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(detail::shared_address(row.at))
               : "memory");
}
// The same of 16-bit elements with each matrix transposed: lane l gets elements 2 * (l % 4) and the next of column l
// / 4.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&to)[4], Shared<char> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(detail::shared_address(row.at))
               : "memory");
}
#define EFFKERN_MMA(name, shape, types)                                                                 \
  __device__ __forceinline__ void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." types                                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
EFFKERN_MMA(mma_f16, "m16n8k16", "f16.f16")
EFFKERN_MMA(mma_bf16, "m16n8k16", "bf16.bf16")
EFFKERN_MMA(mma_tf32, "m16n8k8", "tf32.tf32")
#undef EFFKERN_MMA
__device__ __forceinline__ uint32_t round_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// ---- numbers
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(F16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
__device__ __forceinline__ float to_float(BF16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
template <class T>
__device__ __forceinline__ T from_float(float value) {
  T narrow;
  if constexpr (std::is_same_v<T, F16>)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  else if constexpr (std::is_same_v<T, BF16>)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  else
    narrow = value;
  return narrow;
}
// The two numbers of a word, the lower first, without taking it apart into registers of 16 bits.
template <class T>
__device__ __forceinline__ Vec<float, 2> unpack(uint32_t word) {
  Vec<float, 2> wide;
  if constexpr (std::is_same_v<T, F16>)
    asm("{\n .reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;\n}"
        : "=f"(wide.v[0]), "=f"(wide.v[1])
        : "r"(word));
  else
    wide = {{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)}};
  return wide;
}
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, F16>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ float fma(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma(double a, double b, double c) { return ::fma(a, b, c); }
__device__ __forceinline__ double sqrt(double x) { return ::sqrt(x); }
__device__ __forceinline__ float exp(float x) { return expf(x); }
__device__ __forceinline__ int popcount(uint32_t bits) { return __popc(bits); }

}  // namespace effkern::device
