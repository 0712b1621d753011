// 4 floats a vector (the tests' emulation: 16) in plain C++: any processor, as fast as its compiler vectorises.
#pragma once
#include <cstdint>
#include <cstring>

namespace rosa {
namespace ROSA_ISA {

#ifndef ROSA_LANES
#define ROSA_LANES 4
#endif
constexpr int LANES = ROSA_LANES;
constexpr int STRIP = 2;  // vectors of one row held in registers next to three other rows

#define ROSA_EACH for (int i = 0; i < LANES; ++i)
struct Vec {
  float v[LANES];
};
inline Vec broadcast(float a) {
  Vec r;
  ROSA_EACH r.v[i] = a;
  return r;
}
inline Vec zero() { return broadcast(0); }
inline Vec load(const float* p) {
  Vec r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec load(const uint16_t* p) {  // bfloat16
  uint32_t bits[LANES];
  ROSA_EACH bits[i] = (uint32_t)p[i] << 16;
  Vec r;
  std::memcpy(r.v, bits, sizeof r.v);
  return r;
}
inline void store(uint16_t* p, Vec a) {  // bfloat16, to nearest even; NaN stays NaN
  uint32_t bits[LANES];
  std::memcpy(bits, a.v, sizeof bits);
  ROSA_EACH {
    const bool nan = a.v[i] != a.v[i];
    p[i] = (uint16_t)((nan ? bits[i] | 0x400000u : bits[i] + 0x7fffu + (bits[i] >> 16 & 1)) >> 16);
  }
}
inline Vec add(Vec a, Vec b) {
  ROSA_EACH a.v[i] += b.v[i];
  return a;
}
inline Vec mul(Vec a, Vec b) {
  ROSA_EACH a.v[i] *= b.v[i];
  return a;
}
inline Vec fma(Vec a, Vec b, Vec c) {
  ROSA_EACH c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline float sum(Vec a) {
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
inline Vec keep(uint64_t bits, Vec a) {
  ROSA_EACH a.v[i] = bits >> i & 1 ? a.v[i] : 0.0f;
  return a;
}
inline void transpose(Vec (&a)[LANES]) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = a[i].v[j];
      a[i].v[j] = a[j].v[i];
      a[j].v[i] = t;
    }
}

struct Words {
  uint32_t v[LANES];
};
inline Words broadcast_word(uint32_t a) {
  Words r;
  ROSA_EACH r.v[i] = a;
  return r;
}
inline Words counting_from(uint32_t a) {
  Words r;
  ROSA_EACH r.v[i] = a + (uint32_t)i;
  return r;
}
inline Words exclusive_or(Words a, Words b) {
  ROSA_EACH a.v[i] ^= b.v[i];
  return a;
}
inline void multiply_wide(Words a, uint32_t b, Words& high, Words& low) {
  ROSA_EACH {
    const uint64_t product = (uint64_t)a.v[i] * b;
    high.v[i] = (uint32_t)(product >> 32);
    low.v[i] = (uint32_t)product;
  }
}
inline uint64_t at_least(Words a, uint32_t threshold) {
  uint64_t bits = 0;
  ROSA_EACH bits |= (uint64_t)(a.v[i] >= threshold) << i;
  return bits;
}
#undef ROSA_EACH

}  // namespace ROSA_ISA
}  // namespace rosa
