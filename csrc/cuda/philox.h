// Dropout's random bits, the same as in every backend: rosa_kernels/dropout.py says how Philox4x32-10 makes them. The
// counter (feature / 4, token, 0, 0) gives four words, one for each of four features.
#pragma once
#include "cuda/device_functions.h"
#include "cuda/kernels.h"

namespace rosa {

// Bit i is set where element (token, 4 * group + i) is kept.
__device__ __forceinline__ unsigned keep_bits(uint64_t seed, uint64_t threshold, uint32_t token, uint32_t group) {
  if (threshold > 0xffffffffu) return 0;
  uint32_t c[4] = {group, token, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = static_cast<uint64_t>(c[0]) * 0xD2511F53u, high = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    c[0] = static_cast<uint32_t>(high >> 32) ^ c[1] ^ key[0];
    c[2] = static_cast<uint32_t>(low >> 32) ^ c[3] ^ key[1];
    c[1] = static_cast<uint32_t>(high);
    c[3] = static_cast<uint32_t>(low);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= static_cast<unsigned>(c[i] >= static_cast<uint32_t>(threshold)) << i;
  return bits;
}

// Zeroes those of a vector's numbers that dropout drops. The vector begins at (token, feature); feature is a multiple
// of 4.
template <typename T>
__device__ __forceinline__ void drop(Vector<T>& v, const Dropout& dropout, uint64_t seed, int64_t token,
                                     int64_t feature) {
  if (!dropout.seed) return;
#pragma unroll
  for (int group = 0; group < Vector<T>::SIZE / 4; ++group) {
    const unsigned bits =
        keep_bits(seed, dropout.threshold, static_cast<uint32_t>(token), static_cast<uint32_t>(feature / 4 + group));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(bits >> i & 1)) v.at[4 * group + i] = rounded<T>(0.0f);
  }
}

}  // namespace rosa
