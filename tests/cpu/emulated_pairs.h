// csrc/cpu/isa/avx512bf16.h in plain C++, with the instructions' own arithmetic (Intel's manual: VDPBF16PS,
// VCVTNE2PS2BF16).
#pragma once
#include <cmath>

#include "cpu/isa/portable.h"

namespace rosa {
namespace ROSA_ISA {

inline uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
inline bool is_finite(float a) { return (bits_of(a) & 0x7f800000u) != 0x7f800000u; }
inline float flushed(float a) { return bits_of(a) & 0x7f800000u ? a : float_of(bits_of(a) & 0x80000000u); }

// One rounding, denormals in and out are zeros.
inline float flushed_fma(float a, float b, float sum) {
  return flushed(std::fmaf(flushed(a), flushed(b), flushed(sum)));
}
inline float low_half(uint32_t pair) { return float_of(pair << 16); }
inline float high_half(uint32_t pair) { return float_of(pair & 0xffff0000u); }

inline uint16_t rounded_half(float a) {
  const uint32_t bits = bits_of(flushed(a));
  return (uint16_t)((a != a ? bits | 0x400000u : is_finite(a) ? bits + 0x7fffu + (bits >> 16 & 1) : bits) >> 16);
}

struct Pairs {
  uint32_t v[LANES];
};
inline Pairs load_pairs(const uint32_t* p) {
  Pairs r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_pairs(uint32_t* p, Pairs a) { std::memcpy(p, a.v, sizeof a.v); }
template <int Count>
inline Pairs broadcast_pairs(const void* p) {
  Pairs r;
  for (int i = 0; i < LANES; ++i) std::memcpy(r.v + i, (const uint32_t*)p + i % Count, sizeof *r.v);
  return r;
}
inline Vec add_neighbours(Vec a, Vec b) {
  Vec r;
  for (int i = 0; i < LANES / 2; ++i) {
    r.v[i] = a.v[2 * i] + a.v[2 * i + 1];
    r.v[LANES / 2 + i] = b.v[2 * i] + b.v[2 * i + 1];
  }
  return r;
}
inline Vec dot_pairs(Vec sum, Pairs a, Pairs b) {
  for (int i = 0; i < LANES; ++i) {
    sum.v[i] = flushed_fma(high_half(a.v[i]), high_half(b.v[i]), sum.v[i]);
    sum.v[i] = flushed_fma(low_half(a.v[i]), low_half(b.v[i]), sum.v[i]);
  }
  return sum;
}
inline Pairs pairs_of(Vec even, Vec odd) {
  Pairs r;
  for (int i = 0; i < LANES; ++i) r.v[i] = rounded_half(even.v[i]) | (uint32_t)rounded_half(odd.v[i]) << 16;
  return r;
}
inline void store_two(uint16_t* to, Vec low, Vec high) {
  for (int i = 0; i < LANES; ++i) to[i] = rounded_half(low.v[i]), to[LANES + i] = rounded_half(high.v[i]);
}
inline Pairs interleave(const uint16_t* even, const uint16_t* odd) {
  Pairs r;
  for (int i = 0; i < LANES; ++i) r.v[i] = even[i] | (uint32_t)odd[i] << 16;
  return r;
}
inline Vec even_of(Pairs a) {
  Vec r;
  for (int i = 0; i < LANES; ++i) r.v[i] = low_half(a.v[i]);
  return r;
}
inline Vec odd_of(Pairs a) {
  Vec r;
  for (int i = 0; i < LANES; ++i) r.v[i] = high_half(a.v[i]);
  return r;
}
inline Pairs as_pairs(Vec a) {
  Pairs r;
  for (int i = 0; i < LANES; ++i) r.v[i] = bits_of(a.v[i]);
  return r;
}
inline Vec as_floats(Pairs a) {
  Vec r;
  for (int i = 0; i < LANES; ++i) r.v[i] = float_of(a.v[i]);
  return r;
}
inline Vec truncated(Vec a) {
  for (float& lane : a.v) lane = float_of((bits_of(lane) & 0xffff0000u) | (lane != lane ? 0x400000u : 0u));
  return a;
}
inline Vec add_finite(Vec total, Vec part) {
  for (int i = 0; i < LANES; ++i)
    if (is_finite(part.v[i])) total.v[i] += part.v[i];
  return total;
}

}  // namespace ROSA_ISA
}  // namespace rosa
