// Numbers and 16-byte vectors of them. Memory holds fp32, bf16 or fp16; sums are in fp32.
#pragma once
#include <type_traits>

#include "cuda/constants.h"
#include "cuda/platform.h"

namespace rosa {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }

template <typename T>
__device__ T rounded(float x);
template <>
__device__ __forceinline__ float rounded<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half rounded<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T, typename From>
__device__ __forceinline__ T converted(From x) {
  if constexpr (std::is_same_v<T, From>)
    return x;
  else
    return rounded<T>(widened(x));
}

// Two 16-bit numbers as an mma's operand holds them: the first is in the low half.
template <typename T>
__device__ __forceinline__ uint32_t packed(T low, T high) {
  static_assert(sizeof(T) == 2, "16-bit numbers");
  uint16_t l, h;
  memcpy(&l, &low, 2);
  memcpy(&h, &high, 2);
  return static_cast<uint32_t>(h) << 16 | l;
}

// 16 bytes of numbers.
template <typename T>
struct Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T at[SIZE];
};

// The first n numbers at p, then zeros. `aligned` says that p is a multiple of 16 bytes: one access reads a whole
// vector.
template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p, int64_t n, bool aligned) {
  Vector<T> v;
  if (aligned && n >= Vector<T>::SIZE) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    memcpy(&v, &raw, 16);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) v.at[i] = i < n ? p[i] : rounded<T>(0.0f);
  }
  return v;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& v, int64_t n, bool aligned) {
  if (aligned && n >= Vector<T>::SIZE) {
    uint4 raw;
    memcpy(&raw, &v, 16);
    *reinterpret_cast<uint4*>(p) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i)
      if (i < n) p[i] = v.at[i];
  }
}

// Numbers [feature, feature + SIZE) of a row; zeros stand beyond the matrix.
template <typename T>
__device__ __forceinline__ Vector<T> row_vector(const T* matrix, int64_t row, int64_t rows, int64_t stride,
                                                int64_t feature, int64_t features, bool aligned) {
  return load_vector(matrix + row * stride + feature, row < rows ? features - feature : 0, aligned);
}

// Whether tensor cores multiply numbers of T by numbers of U. An fp32 number beside bf16 becomes three bf16 terms. No
// sum of fp16 terms holds a small fp32 number, because fp16 ends at 2^-24.
template <typename T, typename U>
constexpr bool ON_TENSOR_CORES = sizeof(T) == 2 && (std::is_same_v<T, U> || std::is_same_v<T, __nv_bfloat16>);

// How many numbers of T stand for one number of U.
template <typename T, typename U>
constexpr int TERMS = std::is_same_v<T, U> ? 1 : SPLIT_TERMS;

// Makes x a sum of terms, the largest first. Three bf16 terms keep fp32's 24 bits. Where the first one rounds to
// infinity, the others are zero.
template <typename T, int COUNT>
__device__ __forceinline__ void split(float x, T (&terms)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    terms[i] = rounded<T>(x);
    const float term = widened(terms[i]);
    x = term - term == 0.0f ? x - term : 0.0f;
  }
}

// Makes two numbers of U operands of an mma of T: terms[i] holds the i-th terms of both.
template <typename T, typename U>
__device__ __forceinline__ void packed_terms(uint32_t (&terms)[TERMS<T, U>], U low, U high) {
  if constexpr (TERMS<T, U> == 1) {
    terms[0] = packed(low, high);
  } else {
    T low_terms[TERMS<T, U>], high_terms[TERMS<T, U>];
    split(low, low_terms);
    split(high, high_terms);
#pragma unroll
    for (int i = 0; i < TERMS<T, U>; ++i) terms[i] = packed(low_terms[i], high_terms[i]);
  }
}

}  // namespace rosa
