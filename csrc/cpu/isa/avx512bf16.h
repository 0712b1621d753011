// AVX512-BF16: 16 pairs of bfloat16 a vector, and what the products of bf16_vnni.h need beyond avx512.h.
#pragma once
#include <cstring>

#include "cpu/isa/avx512.h"

#ifndef ROSA_BF16_DOT
#define ROSA_BF16_DOT "cpu/dense/bf16_dot_avx512.h"
#endif

namespace rosa {
namespace ROSA_ISA {

struct Pairs {
  __m512i v;
};
inline Pairs load_pairs(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_pairs(uint32_t* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
// Loads Count pairs and repeats them until the register is full.
template <int Count>
inline Pairs broadcast_pairs(const void* p) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  if (Count == 4) return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))};
  if (Count == 2) {
    int64_t pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return {_mm512_set1_epi64(pairs)};
  }
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}

// a[0] + a[1], a[2] + a[3], ..., then those of b.
inline Vec add_neighbours(Vec a, Vec b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
}

// sum + a.high · b.high, then + a.low · b.low, in fp32; denormals are zeros.
inline Vec dot_pairs(Vec sum, Pairs a, Pairs b) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)}; }

// (even[i], odd[i]) rounded to bfloat16, to nearest even; denormals become zeros.
inline Pairs pairs_of(Vec even, Vec odd) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  return {_mm512_permutexvar_epi16(index, (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v))};
}

// low and high rounded in the same way, one after the other.
inline void store_two(uint16_t* to, Vec low, Vec high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
}

// (even[i], odd[i]) of 16 bfloat16 each.
inline Pairs interleave(const uint16_t* even, const uint16_t* odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
  return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
}

// A pair of bfloat16 as two vectors of fp32, and the bits of a vector of fp32 kept among pairs.
inline Vec even_of(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline Vec odd_of(Pairs a) { return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32((int)0xffff0000)))}; }
inline Pairs as_pairs(Vec a) { return {_mm512_castps_si512(a.v)}; }
inline Vec as_floats(Pairs a) { return {_mm512_castsi512_ps(a.v)}; }

// To bfloat16 toward zero; NaN stays NaN.
inline Vec truncated(Vec a) {
  const __m512i high = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32((int)0xffff0000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_castsi512_ps(_mm512_mask_or_epi32(high, nan, high, _mm512_set1_epi32(0x400000)))};
}

// total + part where part is finite, else total.
inline Vec add_finite(Vec total, Vec part) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(part.v), exponent);
  return {_mm512_mask_add_ps(total.v, _mm512_cmpneq_epi32_mask(bits, exponent), total.v, part.v)};
}

}  // namespace ROSA_ISA
}  // namespace rosa
