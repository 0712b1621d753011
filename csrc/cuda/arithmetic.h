// Numbers and 16-byte vectors of them: fp32, bf16 and fp16 in memory, fp32 in sums.
#pragma once
#include <type_traits>

#include "platform.h"

namespace rosa {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }

template <typename T>
__device__ T rounded(float x);
template <>
__device__ __forceinline__ float rounded<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half rounded<__half>(float x) { return __float2half_rn(x); }

template <typename T, typename From>
__device__ __forceinline__ T converted(From x) {
  if constexpr (std::is_same_v<T, From>)
    return x;
  else
    return rounded<T>(widened(x));
}

// Two 16-bit numbers as an mma operand holds them, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t packed(T low, T high) {
  static_assert(sizeof(T) == 2, "16-bit numbers");
  uint16_t l, h;
  memcpy(&l, &low, 2);
  memcpy(&h, &high, 2);
  return static_cast<uint32_t>(h) << 16 | l;
}

// 16 bytes.
template <typename T>
struct Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T at[SIZE];
};

// The first n numbers at p, zeros after; one access where `aligned` says that whole vectors are.
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

// An fp32 number as a sum of numbers of T, the largest first: 2 fp16 or 3 bf16 terms keep its 24 bits (fp16 where its
// range allows it).
template <typename T>
struct Terms;
template <>
struct Terms<__half> {
  static constexpr int COUNT = 2;
};
template <>
struct Terms<__nv_bfloat16> {
  static constexpr int COUNT = 3;
};

template <typename T>
__device__ __forceinline__ void split(float x, T (&terms)[Terms<T>::COUNT]) {
#pragma unroll
  for (int i = 0; i < Terms<T>::COUNT; ++i) {
    terms[i] = rounded<T>(x);
    x -= widened(terms[i]);
  }
}

}  // namespace rosa
