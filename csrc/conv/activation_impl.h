// The activations that are no clamp. Included by the files of one instruction set inside its namespace, after
// lanes_impl.h; includes nothing itself.

// exp(v) to about 1 ulp: 2^k * exp(r) with |r| <= ln 2 / 2 and Taylor's polynomial of degree 7. Infinite from 88.4 on,
// never below exp(-87); NaN stays NaN.
template <int kLanes>
inline typename Lanes<kLanes>::Vec exponential(typename Lanes<kLanes>::Vec v) {
  using Vec = typename Lanes<kLanes>::Vec;
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
  const Vec zero{};
  Vec x = v < zero - 87.0f ? zero - 87.0f : v;
  x = x > zero + 89.0f ? zero + 89.0f : x;
  const Vec magic = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec k = shifted - magic;
  Vec r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  Vec e = zero + 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const Bits bits = ((Bits)shifted << 23) + (127u << 23);  // a cast of vectors keeps the bits; k is in the low ones
  return e * (Vec)bits;
}

// The activations that are no clamp.
template <int kLanes>
inline typename Lanes<kLanes>::Vec curve(typename Lanes<kLanes>::Vec v, Act act) {
  using Vec = typename Lanes<kLanes>::Vec;
  const Vec zero{}, one = zero + 1.0f, six = zero + 6.0f;
  if (act == Act::Hardswish) {
    Vec gate = v + 3.0f;
    gate = gate < zero ? zero : gate;
    gate = gate > six ? six : gate;
    return v * gate / 6.0f;
  }
  return v / (one + exponential<kLanes>(-v));
}
