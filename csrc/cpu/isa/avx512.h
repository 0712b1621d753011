// 16 floats a vector: AVX-512 F, BW, DQ and VL.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace rosa {
namespace ROSA_ISA {

constexpr int LANES = 16;
constexpr int STRIP = 4;  // vectors of one row held in registers next to three other rows

struct Vec {
  __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec load(const uint16_t* p) {  // bfloat16
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline void store(uint16_t* p, Vec a) {  // bfloat16, to nearest even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline Vec keep(uint64_t bits, Vec a) { return {_mm512_maskz_mov_ps((__mmask16)bits, a.v)}; }

inline void transpose(Vec (&a)[LANES]) {
  __m512 r[16], t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d p = _mm512_castps_pd(t[4 * i]), q = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d u = _mm512_castps_pd(t[4 * i + 1]), w = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(u, w));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(u, w));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    a[8 + i].v = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    a[4 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    a[12 + i].v = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

struct Words {
  __m512i v;
};
inline Words broadcast_word(uint32_t a) { return {_mm512_set1_epi32((int)a)}; }
inline Words counting_from(uint32_t a) {
  return {_mm512_add_epi32(_mm512_set1_epi32((int)a),
                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))};
}
inline Words exclusive_or(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline void multiply_wide(Words a, uint32_t b, Words& high, Words& low) {
  const __m512i factor = _mm512_set1_epi64(b);
  const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  low.v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high.v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
inline uint64_t at_least(Words a, uint32_t threshold) {
  return _mm512_cmpge_epu32_mask(a.v, _mm512_set1_epi32((int)threshold));
}

}  // namespace ROSA_ISA
}  // namespace rosa
