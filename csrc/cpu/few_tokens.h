// The adapter's forward for a handful of tokens, one at a time: vectors run along features instead of tokens.
#pragma once
#include "forward.h"

namespace rosa {
namespace ROSA_ISA {

constexpr int64_t FEW_TOKENS = 8;  // above it a block of TOKENS, even if mostly empty, is faster

// Σ_l a[l] · b[l]; four sums hide the latency of an addition.
inline float dot(const float* a, const float* b, int64_t length) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t l = 0;
  for (; l + 4 * LANES <= length; l += 4 * LANES)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] = fma(load(a + l + v * LANES), load(b + l + v * LANES), sums[v]);
  for (; l + LANES <= length; l += LANES) sums[0] = fma(load(a + l), load(b + l), sums[0]);
  float total = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  for (; l < length; ++l) total += a[l] * b[l];
  return total;
}

// to[f] = from[f] as fp32.
template <class T>
inline void widen(const T* from, int64_t features, float* to) {
  int64_t f = 0;
  for (; f + LANES <= features; f += LANES) store(to + f, load(from + f));
  T padded[LANES] = {};
  float as_float[LANES];
  for (int64_t c = 0; c < features - f; ++c) padded[c] = from[f + c];
  store(as_float, load(padded));
  for (int64_t c = 0; c < features - f; ++c) to[f + c] = as_float[c];
}

// to[f] += delta[f], rounded once.
template <class T>
inline void add_rounded(const float* delta, int64_t features, T* to) {
  int64_t f = 0;
  for (; f + LANES <= features; f += LANES) store(to + f, add(load(to + f), load(delta + f)));
  T padded[LANES] = {};
  float rest[LANES] = {};
  for (int64_t c = 0; c < features - f; ++c) padded[c] = to[f + c], rest[c] = delta[f + c];
  store(padded, add(load(padded), load(rest)));
  for (int64_t c = 0; c < features - f; ++c) to[f + c] = padded[c];
}

inline void drop(const Dropout& dropout, int64_t token, int64_t features, uint64_t* bits, float* x) {
  keep_bits(dropout, token, features, bits);
  for (int64_t f = 0; f < features; ++f)
    if (!(bits[f] & 1)) x[f] = 0;
}

template <class T>
void forward_few(const Forward& f) {
  const int64_t r = f.low_rank.r;
  static thread_local Arena arena;
  float* piece[5];
  arena.cut({f.in_features, f.in_features, r, f.out_features, f.dropout.on ? 2 * rounded_up(f.in_features, 4) : 0}, piece);
  float *x = piece[0], *x_hat = f.dropout.on ? piece[1] : piece[0], *ranks = piece[2], *delta = piece[3];
  const float alpha = low_rank_scale(f.low_rank, f.dropout);
  for (int64_t t = 0; t < f.tokens; ++t) {
    widen((const T*)f.x.data + t * f.x.stride, f.in_features, x);
    if (f.dropout.on) {
      std::memcpy(x_hat, x, sizeof(float) * f.in_features);
      drop(f.dropout, t, f.in_features, reinterpret_cast<uint64_t*>(piece[4]), x_hat);
    }
    for (int64_t q = 0; q < r; ++q) ranks[q] = alpha * dot(f.low_rank.A + q * f.in_features, x_hat, f.in_features);
    for (int64_t i = 0; i < f.out_features; ++i) {
      float total = r ? dot(f.low_rank.B + i * r, ranks, r) : 0.0f;
      for (int64_t e = f.sparse.values ? f.sparse.crow[i] : 0; f.sparse.values && e < f.sparse.crow[i + 1]; ++e)
        total += f.sparse.values[e] * x[f.sparse.col[e]];
      delta[i] = total;
    }
    add_rounded(delta, f.out_features, (T*)f.y.data + t * f.y.stride);
  }
}

}  // namespace ROSA_ISA
}  // namespace rosa
