#include "rows.h"

#include <algorithm>
#include <cstring>

#include "../common/parallel.h"

namespace effkern::block_skip {
namespace {

using conv::Activation;

constexpr int64_t kGrain = 1 << 16;  // elements a thread should get at least; less is done by the caller

int64_t elements(const Activation& t) { return t.c * t.h * t.w; }

int64_t grain(const Activation& t) { return 1 + kGrain / std::max<int64_t>(1, elements(t)); }

// True if a sample is one contiguous run of memory that has the same order in both.
bool same_dense_order(const Activation& a, const Activation& b) {
  const int64_t size[3] = {a.c, a.h, a.w};
  const int64_t sa[3] = {a.sc, a.sh, a.sw}, sb[3] = {b.sc, b.sh, b.sw};
  int64_t span = 1;
  for (int i = 0; i < 3; ++i) {
    if (size[i] == 1) continue;
    if (sa[i] != sb[i] || sa[i] <= 0) return false;
    span += (size[i] - 1) * sa[i];
  }
  return span == elements(a);
}

// Calls body(offset in a, offset in b) for all elements of sample `na` of a and `nb` of b, along b's fastest dimension.
template <class Body>
void each(const Activation& a, int64_t na, const Activation& b, int64_t nb, Body&& body) {
  const int64_t a0 = na * a.sn, b0 = nb * b.sn;
  if (b.sc == 1) {
    for (int64_t i = 0; i < b.h; ++i)
      for (int64_t j = 0; j < b.w; ++j)
        for (int64_t c = 0; c < b.c; ++c)
          body(a0 + c * a.sc + i * a.sh + j * a.sw, b0 + c * b.sc + i * b.sh + j * b.sw);
  } else {
    for (int64_t c = 0; c < b.c; ++c)
      for (int64_t i = 0; i < b.h; ++i)
        for (int64_t j = 0; j < b.w; ++j)
          body(a0 + c * a.sc + i * a.sh + j * a.sw, b0 + c * b.sc + i * b.sh + j * b.sw);
  }
}

template <class T>
void copy_bits(const Activation& from, int64_t nf, const Activation& to, int64_t nt) {
  const T* source = static_cast<const T*>(from.data);
  T* target = static_cast<T*>(to.data);
  each(from, nf, to, nt, [&](int64_t f, int64_t t) { target[t] = source[f]; });
}

}  // namespace

Activation nhwc(float* data, int64_t n, int64_t c, int64_t h, int64_t w) {
  return {data, DType::F32, n, c, h, w, h * w * c, 1, w * c, c};
}

Activation from_sample(const Activation& t, int64_t begin) {
  Activation part = t;
  part.data = static_cast<char*>(t.data) + begin * t.sn * dtype_size(t.dtype);
  part.n = t.n - begin;
  return part;
}

void copy_rows(const Activation& from, const int64_t* from_rows, const Activation& to, const int64_t* to_rows,
               int64_t count) {
  const bool bits = from.dtype == to.dtype, whole = bits && same_dense_order(from, to);
  const int64_t size = dtype_size(to.dtype), bytes = elements(to) * size;
  parallel_for(0, count, grain(to), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t nf = from_rows != nullptr ? from_rows[i] : i, nt = to_rows != nullptr ? to_rows[i] : i;
      if (whole)
        std::memcpy(static_cast<char*>(to.data) + nt * to.sn * size,
                    static_cast<const char*>(from.data) + nf * from.sn * size, bytes);
      else if (bits && size == 4)
        copy_bits<uint32_t>(from, nf, to, nt);
      else if (bits)
        copy_bits<uint16_t>(from, nf, to, nt);
      else
        each(from, nf, to, nt,
             [&](int64_t f, int64_t t) { store_float(to.data, to.dtype, t, load_float(from.data, from.dtype, f)); });
    }
  });
}

void blend_rows(const Activation& z, const float* gate, const Activation& old, const Activation& y, const int64_t* rows,
                int64_t count) {
  parallel_for(0, count, grain(y), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float m = gate[i];
      const Activation now = from_sample(z, i), before = from_sample(old, rows[i]), after = from_sample(y, rows[i]);
      for (int64_t c = 0; c < y.c; ++c)
        for (int64_t h = 0; h < y.h; ++h)
          for (int64_t w = 0; w < y.w; ++w) {
            const float a = load_float(now.data, now.dtype, c * now.sc + h * now.sh + w * now.sw);
            const float b = load_float(before.data, before.dtype, c * before.sc + h * before.sh + w * before.sw);
            store_float(after.data, after.dtype, c * after.sc + h * after.sh + w * after.sw, m * a + (1 - m) * b);
          }
    }
  });
}

}  // namespace effkern::block_skip
