// Dropout's bits. Philox4x32-10 of the counter (feature / 4, token, 0, 0) gives four words, one for each of four
// features; rosa_kernels/dropout.py defines them.
#pragma once
#include "cpu/common/arithmetic.h"
#include "cpu/common/kernels.h"

namespace rosa {
namespace ROSA_ISA {

inline void philox(Words (&c)[4], uint64_t seed) {
  uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    Words high[2], low[2];
    multiply_wide(c[0], 0xD2511F53u, high[0], low[0]);
    multiply_wide(c[2], 0xCD9E8D57u, high[1], low[1]);
    c[0] = exclusive_or(exclusive_or(high[1], c[1]), broadcast_word(key[0]));
    c[2] = exclusive_or(exclusive_or(high[0], c[3]), broadcast_word(key[1]));
    c[1] = low[1];
    c[3] = low[0];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

// Bit t of bits[f] is set where element (first_token + t, f) is kept. Writes up to the next multiple of 4 features.
inline void keep_bits(const Dropout& dropout, int64_t first_token, int64_t features, uint64_t* bits) {
  for (int64_t f = 0; f < features; f += 4) {
    uint64_t kept[4] = {0, 0, 0, 0};
    for (int64_t t = 0; t < BLOCK_TOKENS && dropout.threshold <= 0xffffffffu; t += LANES) {
      Words c[4] = {broadcast_word((uint32_t)(f / 4)), counting_from((uint32_t)(first_token + t)), broadcast_word(0),
                    broadcast_word(0)};
      philox(c, dropout.seed);
      for (int i = 0; i < 4; ++i) kept[i] |= at_least(c[i], (uint32_t)dropout.threshold) << t;
    }
    for (int i = 0; i < 4; ++i) bits[f + i] = kept[i];
  }
}

}  // namespace ROSA_ISA
}  // namespace rosa
