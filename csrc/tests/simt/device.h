// The words of csrc/common/cuda/device.cuh as a plain C++ compiler runs them. Included by device.cuh itself when
// EFFKERN_SIMT is defined.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../common/half.h"
#include "block.h"
#include "tensor_core.h"

#define __global__ inline
#define __device__ inline
#define __host__
#define __forceinline__
#define __launch_bounds__(...)
#define __grid_constant__

namespace effkern::device {

using Site = test::simt::Site;
using test::simt::Op;
using test::simt::self;

// ---- where am I
inline int thread() { return self->id; }
inline int lane() { return self->lane(); }
inline unsigned block() { return self->block->index; }
inline unsigned blocks() { return test::simt::grid_size(); }

// ---- pointers that only the functions below can follow
template <class T>
struct Global {
  T* p = nullptr;
  test::simt::Memory* memory = nullptr;

  Global() = default;
  Global(T* p, test::simt::Memory* memory) : p(p), memory(memory) {}
  // As host code makes them that knows nothing of the harness (csrc/tests/runtime).
  Global(T* p) : p(p), memory(test::simt::memory_at(p)) {}
  template <class U>
    requires std::is_same_v<T, const U>
  Global(Global<U> other) : p(other.p), memory(other.memory) {}
  explicit operator bool() const { return p != nullptr; }
  // Through an integer: a pointer to a pixel of the padding is formed, and never followed.
  Global operator+(int64_t i) const {
    return {reinterpret_cast<T*>(reinterpret_cast<intptr_t>(p) + i * static_cast<int64_t>(sizeof(T))), memory};
  }
  template <class U>
  Global<U> as() const {
    return {reinterpret_cast<U*>(p), memory};
  }
  int64_t offset() const { return memory == nullptr ? 0 : reinterpret_cast<const char*>(p) - memory->data(); }
};

template <class T>
struct Shared {
  int32_t at = 0;  // bytes from the start of the block's shared memory
  Shared operator+(int i) const { return {at + i * static_cast<int>(sizeof(T))}; }
  template <class U>
  Shared<U> as() const {
    return {at};
  }
};

inline Shared<char> shared_memory() { return {0}; }

namespace detail {
template <class T>
test::simt::Memory& memory_of(const Global<T>& from, const Site& site) {
  if (from.memory == nullptr)
    test::simt::fault(test::simt::Fault::OutOfBounds, "a null pointer at " + test::simt::place(site));
  return *from.memory;
}
template <class V>
constexpr void check_width() {
  static_assert(sizeof(V) <= 16 && (sizeof(V) & (sizeof(V) - 1)) == 0 && std::is_trivially_copyable_v<V>);
}
}  // namespace detail

template <class V, class T>
V load(Global<T> from, Site site = Site::current()) {
  detail::check_width<V>();
  test::simt::maybe_preempt();
  V value;
  detail::memory_of(from, site).read(from.offset(), sizeof(V), &value, site);
  test::simt::count(Op::LoadGlobal, site, reinterpret_cast<uint64_t>(from.p), sizeof(V));
  return value;
}
template <class V, class T>
void store(Global<T> to, V value, Site site = Site::current()) {
  detail::check_width<V>();
  static_assert(!std::is_const_v<T>);
  test::simt::maybe_preempt();
  detail::memory_of(to, site).write(to.offset(), sizeof(V), &value, site);
  test::simt::count(Op::StoreGlobal, site, reinterpret_cast<uint64_t>(to.p), sizeof(V));
}
template <class V, class T>
V load(Shared<T> from, Site site = Site::current()) {
  detail::check_width<V>();
  test::simt::maybe_preempt();
  V value;
  self->block->shared->read(from.at, sizeof(V), &value, site);
  test::simt::count(Op::LoadShared, site, static_cast<uint64_t>(from.at), sizeof(V));
  return value;
}
template <class V, class T>
void store(Shared<T> to, V value, Site site = Site::current()) {
  detail::check_width<V>();
  test::simt::maybe_preempt();
  self->block->shared->write(to.at, sizeof(V), &value, site);
  test::simt::count(Op::StoreShared, site, static_cast<uint64_t>(to.at), sizeof(V));
}
inline int32_t atomic_add(Global<int32_t> at, int32_t value, Site site = Site::current()) {
  test::simt::maybe_preempt();
  return detail::memory_of(at, site).add(at.offset(), value, site);
}

// ---- asynchronous copies
template <class T>
void copy_async16(Shared<char> to, Global<T> from, int bytes, Site site = Site::current()) {
  test::simt::maybe_preempt();
  test::simt::count(Op::AsyncCopyShared, site, static_cast<uint64_t>(to.at), 16);
  test::simt::count(Op::AsyncCopy, site, reinterpret_cast<uint64_t>(from.p), static_cast<size_t>(bytes));
  if (bytes > 0) detail::memory_of(from, site);
  test::simt::async_issue(to.at, from.memory, from.offset(), static_cast<size_t>(bytes), site);
}
template <class T>
void copy_async16_if(bool valid, Shared<char> to, Global<T> from, Site site = Site::current()) {
  copy_async16(to, from, valid ? 16 : 0, site);
}
template <class T>
void copy_async16_where(bool wanted, Shared<char> to, Global<T> from, Site site = Site::current()) {
  if (wanted) copy_async16(to, from, 16, site);
}
inline void copy_commit() { test::simt::async_commit(); }
template <int kLeft>
void copy_wait() {
  test::simt::async_wait(kLeft);
}

// ---- barriers and warp operations
inline void sync(Site site = Site::current()) { test::simt::barrier(0, 0, site); }
inline void sync_named(int id, int threads, Site site = Site::current()) {
  if (id < 1 || id > 15 || threads % 32 != 0)
    test::simt::fault(test::simt::Fault::Divergence,
                      "named barriers are 1 to 15 and of whole warps, at " + test::simt::place(site));
  test::simt::barrier(id, threads, site);
}

constexpr uint32_t kAllLanes = 0xffffffffu;

inline void sync_warp(uint32_t mask = kAllLanes, Site site = Site::current()) {
  test::simt::collective(mask, site, nullptr, true, [](const auto&, uint32_t) {});
}

namespace detail {
struct Vote {
  bool mine;
  uint32_t all;
};
template <class T>
struct Exchange {
  T value, result;
  int from;
};
template <class T>
T shuffle(T value, int from, uint32_t mask, const Site& site) {
  static_assert(sizeof(T) == 4);
  Exchange<T> mine{value, value, from};
  test::simt::collective(mask, site, &mine, false, [](const auto& lanes, uint32_t mask) {
    for (int i = 0; i < 32; ++i) {
      if ((mask >> i & 1) == 0) continue;
      auto* to = static_cast<Exchange<T>*>(lanes[static_cast<size_t>(i)]);
      // From a lane that does not take part comes nothing one may use.
      if ((mask >> to->from & 1) != 0)
        to->result = static_cast<const Exchange<T>*>(lanes[static_cast<size_t>(to->from)])->value;
      else
        std::memset(&to->result, 0xff, sizeof(T));
    }
  });
  return mine.result;
}
}  // namespace detail

inline uint32_t ballot(bool vote, uint32_t mask = kAllLanes, Site site = Site::current()) {
  detail::Vote mine{vote, 0};
  test::simt::collective(mask, site, &mine, false, [](const auto& lanes, uint32_t mask) {
    uint32_t all = 0;
    for (size_t i = 0; i < 32; ++i)
      if ((mask >> i & 1) != 0 && static_cast<detail::Vote*>(lanes[i])->mine) all |= 1u << i;
    for (size_t i = 0; i < 32; ++i)
      if ((mask >> i & 1) != 0) static_cast<detail::Vote*>(lanes[i])->all = all;
  });
  return mine.all;
}
template <class T>
T shuffle(T value, int from, uint32_t mask = kAllLanes, Site site = Site::current()) {
  return detail::shuffle(value, from % 32, mask, site);
}
template <class T>
T shuffle_xor(T value, int bits, uint32_t mask = kAllLanes, Site site = Site::current()) {
  return detail::shuffle(value, (self->lane() ^ bits) % 32, mask, site);
}
template <class T>
T shuffle_down(T value, int by, uint32_t mask = kAllLanes, Site site = Site::current()) {
  return detail::shuffle(value, self->lane() + by < 32 ? self->lane() + by : self->lane(), mask, site);
}
template <class T>
T shuffle_up(T value, int by, uint32_t mask = kAllLanes, Site site = Site::current()) {
  return detail::shuffle(value, self->lane() >= by ? self->lane() - by : self->lane(), mask, site);
}
inline uint32_t reduce_max(uint32_t value, Site site = Site::current()) {
  for (int bits = 16; bits > 0; bits /= 2) value = std::max(value, shuffle_xor(value, bits, kAllLanes, site));
  return value;
}
inline uint32_t reduce_add(uint32_t value, Site site = Site::current()) {
  for (int bits = 16; bits > 0; bits /= 2) value += shuffle_xor(value, bits, kAllLanes, site);
  return value;
}

// ---- tensor cores
namespace detail {
struct MatrixLane {
  uint32_t row[4], *to;
};
inline MatrixLane matrix_row(uint32_t (&to)[4], Shared<char> row, const Site& site) {
  MatrixLane mine{{}, to};
  test::simt::maybe_preempt();
  self->block->shared->read(row.at, 16, mine.row, site);
  test::simt::count(Op::LoadMatrix, site, static_cast<uint64_t>(row.at), 16);
  return mine;
}
}  // namespace detail

inline void load_matrix_x4(uint32_t (&to)[4], Shared<char> row, Site site = Site::current()) {
  using Lane = detail::MatrixLane;
  Lane mine = detail::matrix_row(to, row, site);
  test::simt::collective(kAllLanes, site, &mine, false, [](const auto& lanes, uint32_t) {
    for (size_t lane = 0; lane < 32; ++lane)
      for (size_t matrix = 0; matrix < 4; ++matrix)
        static_cast<Lane*>(lanes[lane])->to[matrix] = static_cast<Lane*>(lanes[matrix * 8 + lane / 4])->row[lane % 4];
  });
}
inline void load_matrix_x4_transposed(uint32_t (&to)[4], Shared<char> row, Site site = Site::current()) {
  using Lane = detail::MatrixLane;
  Lane mine = detail::matrix_row(to, row, site);
  test::simt::collective(kAllLanes, site, &mine, false, [](const auto& lanes, uint32_t) {
    for (size_t lane = 0; lane < 32; ++lane)
      for (size_t matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair = 0;  // of rows 2 * (lane % 4) and the next, the element of column lane / 4
        for (size_t half = 0; half < 2; ++half) {
          const auto* row = static_cast<Lane*>(lanes[matrix * 8 + lane % 4 * 2 + half])->row;
          pair |= (row[lane / 8] >> (lane / 4 % 2 * 16) & 0xffffu) << (half * 16);
        }
        static_cast<Lane*>(lanes[lane])->to[matrix] = pair;
      }
  });
}

namespace detail {
template <class Format>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, const Site& site) {
  test::simt::MmaLane mine{c, a, b};
  test::simt::collective(kAllLanes, site, &mine, false, [](const auto& lanes, uint32_t) {
    test::simt::count_mma();
    test::simt::multiply<Format>(lanes);
  });
}
}  // namespace detail

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  detail::mma<test::simt::FormatF16>(c, a, b, site);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  detail::mma<test::simt::FormatBF16>(c, a, b, site);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  detail::mma<test::simt::FormatTF32>(c, a, b, site);
}
// Nearest, ties away from zero, as cvt.rna.tf32 does; infinities and NaN stay what they are.
inline uint32_t round_tf32(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

// ---- numbers
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
inline float to_float(float value) { return value; }
inline float to_float(F16 value) { return f16_to_float(value.bits); }
inline float to_float(BF16 value) { return bf16_to_float(value.bits); }
template <class T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, F16>)
    return {float_to_f16(value)};
  else if constexpr (std::is_same_v<T, BF16>)
    return {float_to_bf16(value)};
  else
    return value;
}
template <class T>
Vec<float, 2> unpack(uint32_t word) {
  return {{to_float(T{static_cast<uint16_t>(word)}), to_float(T{static_cast<uint16_t>(word >> 16)})}};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline double sqrt(double x) { return std::sqrt(x); }
inline float exp(float x) { return std::exp(x); }
inline int popcount(uint32_t bits) { return std::popcount(bits); }

}  // namespace effkern::device
