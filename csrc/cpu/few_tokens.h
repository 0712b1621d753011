// The adapter's forward for a handful of tokens, one at a time: vectors run along features instead of tokens.
#pragma once
#include "forward.h"

namespace rosa {
namespace ROSA_ISA {

// Above it a block of TOKENS, even if mostly empty, is faster; sooner where its strips are narrow.
constexpr int64_t FEW_TOKENS = STRIP * LANES < TOKENS ? 3 : 8;

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

// delta[i] = Σ_q B[i][q] · ranks[q] for rows [begin, end).
inline void expand(const LowRank& l, const float* ranks, int64_t begin, int64_t end, float* delta) {
  if (l.r == 0 || l.r % LANES != 0) {
    for (int64_t i = begin; i < end; ++i) delta[i] = dot(l.B + i * l.r, ranks, l.r);
    return;
  }
  std::memset(delta + begin, 0, sizeof(float) * (end - begin));
  DotProducts dots(delta + begin);
  for (int64_t i = begin; i < end; ++i) {
    Vec products = zero();
    for (int64_t q = 0; q < l.r; q += LANES) products = fma(load(l.B + i * l.r + q), load(ranks + q), products);
    dots.push(products);
  }
  dots.finish();
}

// `items` are shared among threads where each has work for some 20 us: entries of S, read one at a time, and elements of A or B,
// a memory's rate away, for the base's product has swept the caches.
inline int64_t few_slots(int64_t items, int64_t entries, int64_t elements) {
  constexpr int64_t ENTRIES = 1 << 15, ELEMENTS = 1 << 15;
  return larger(1, smaller(smaller(thread_count(), items), entries / ENTRIES + elements / ELEMENTS));
}

template <class T>
void forward_few(const Forward& f) {
  const int64_t r = f.low_rank.r, in = f.in_features, out = f.out_features;
  static thread_local Arena arena;
  float* piece[5];
  arena.cut({f.tokens * in, f.dropout.on ? f.tokens * in : 0, f.tokens * r, f.tokens * out,
             f.dropout.on ? 2 * rounded_up(in, 4) : 0},
            piece);
  float *x = piece[0], *x_hat = f.dropout.on ? piece[1] : piece[0], *ranks = piece[2], *delta = piece[3];
  const float alpha = low_rank_scale(f.low_rank, f.dropout);
  clear_rows<T>(f, 0, f.tokens);
  for (int64_t t = 0; t < f.tokens; ++t) {
    widen((const T*)f.x.data + t * f.x.stride, in, x + t * in);
    if (f.dropout.on) {
      std::memcpy(x_hat + t * in, x + t * in, sizeof(float) * in);
      drop(f.dropout, t, in, reinterpret_cast<uint64_t*>(piece[4]), x_hat + t * in);
    }
  }
  for_slots(few_slots(r, 0, r * in), r, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q)
      for (int64_t t = 0; t < f.tokens; ++t) ranks[t * r + q] = alpha * dot(f.low_rank.A + q * in, x_hat + t * in, in);
  });
  for_slots(few_slots(out, f.tokens * f.sparse.nnz, r * out), out, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t t = 0; t < f.tokens; ++t) expand(f.low_rank, ranks + t * r, begin, end, delta + t * out);
    for (int64_t i = begin; f.sparse.values && i < end; ++i)
      for (int64_t t = 0; t < f.tokens; ++t)
        for (int64_t e = f.sparse.crow[i]; e < f.sparse.crow[i + 1]; ++e)
          delta[t * out + i] += f.sparse.values[e] * x[t * in + f.sparse.col[e]];
    for (int64_t t = 0; t < f.tokens; ++t)
      add_rounded(delta + t * out + begin, end - begin, (T*)f.y.data + t * f.y.stride + begin);
  });
}

}  // namespace ROSA_ISA
}  // namespace rosa
