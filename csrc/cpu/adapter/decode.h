// Decoding: the forward of a few tokens, the base layer's product included. Vectors run along features instead of
// tokens, and the weight is read once, as it lies, without the copies that a library packs for its GEMM.
#pragma once
#include "cpu/adapter/forward.h"

namespace rosa {
namespace ROSA_ISA {

// Rows of a matrix, each to be multiplied with the tokens of `in`, which are fp32 and zero from `length` to the next
// multiple of LANES.
template <class T>
struct Factor {
  const T* rows;
  int64_t stride;
  const float* in;
  int64_t in_stride, length;
};

// tile.sums[j][t] += rows[i + j] · in[first + t], LANES features of the two at a time.
template <int Rows, int Tokens, class T>
ROSA_INLINE void add_dots(RegisterTile<Rows, Tokens>& tile, const Factor<T>& f, int64_t i, int64_t first) {
  const int64_t stride = f.stride, in_stride = f.in_stride, length = f.length;
  const T* rows = f.rows + i * stride;
  const float* in = f.in + first * in_stride;
  int64_t l = 0;
  for (; l + LANES <= length; l += LANES) {
    Vec inputs[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) inputs[t] = load(in + t * in_stride + l);
#pragma GCC unroll 4
    for (int j = 0; j < Rows; ++j) {
      const Vec c = load(rows + j * stride + l);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) tile.sums[j][t] = fma(c, inputs[t], tile.sums[j][t]);
    }
  }
  if (l == length) return;
#pragma GCC unroll 4
  for (int j = 0; j < Rows; ++j) {
    const Vec c = load_some(rows + j * stride + l, length - l);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) tile.sums[j][t] = fma(c, load(in + t * in_stride + l), tile.sums[j][t]);
  }
}

// out[first + t][i + j] = (fresh ? 0 : itself) + the sum of what the factors give, for Rows rows and at most `count`
// tokens.
template <int Rows, int Tokens, class... Factors>
inline void multiply_tile(float* out, int64_t stride, bool fresh, int64_t i, int64_t first, int64_t count,
                          const Factors&... factors) {
  if constexpr (Tokens > 1)
    if (count < Tokens) return multiply_tile<Rows, Tokens - 1>(out, stride, fresh, i, first, count, factors...);
  RegisterTile<Rows, Tokens> tile;
  tile.clear();
  (add_dots(tile, factors, i, first), ...);
  tile.for_each([&](int j, int t) {
    float* const to = out + (first + t) * stride + i + j;
    *to = sum(tile.sums[j][t]) + (fresh ? 0.0f : *to);
  });
}

// Prefetches GROUP rows from i on, because the hardware prefetcher does not follow short pieces of rows. At 8 tokens of
// 4096 x 4096 in bf16 this takes 0.65 of the time without it.
template <class T>
inline void fetch_rows(const Factor<T>& f, int64_t i) {
  for (int64_t j = 0; j < GROUP; ++j)
    for (int64_t l = 0; l < f.length; l += 64 / (int64_t)sizeof(T))
      __builtin_prefetch(f.rows + (i + j) * f.stride + l, 0, 2);
}

// The same for all tokens and rows [begin, end); a few rows meet all tokens while they are in the cache.
template <class... Factors>
inline void multiply_rows_of(float* out, int64_t stride, bool fresh, int64_t tokens, int64_t begin, int64_t end,
                             const Factors&... factors) {
  int64_t i = begin;
  for (; i + GROUP <= end; i += GROUP) {
    if (tokens > STRIP && i + 2 * GROUP <= end) (fetch_rows(factors, i + GROUP), ...);
    for (int64_t t = 0; t < tokens; t += STRIP)
      multiply_tile<GROUP, STRIP>(out, stride, fresh, i, t, tokens - t, factors...);
  }
  for (; i < end; ++i)
    for (int64_t t = 0; t < tokens; t += STRIP)
      multiply_tile<1, STRIP>(out, stride, fresh, i, t, tokens - t, factors...);
}

// to[f] = sums[f] + bias[f], rounded once; bias may be null.
template <class T>
inline void add_bias(const float* sums, const T* bias, int64_t features, T* to) {
  for (int64_t f = 0; f < features; f += LANES) {
    const Vec sum = load_some(sums + f, features - f);
    store_some(to + f, features - f, bias ? add(sum, load_some(bias + f, features - f)) : sum);
  }
}

// Into how many slots `items` are split so that each has work for some 10 us. The work is reading the elements of
// matrices from memory, multiplying each with all tokens, and gathering the entries of S.
inline int64_t decode_slots(int64_t items, int64_t elements, int64_t entries, int64_t tokens) {
  constexpr int64_t READ = 1 << 15, MULTIPLIED = 1 << 19, GATHERED = 1 << 15;
  const int64_t pieces = elements / READ + elements * tokens / MULTIPLIED + entries * tokens / GATHERED;
  return larger(1, smaller(smaller(thread_count(), items), pieces));
}

// T is the type of x, weight, bias and y, P that of A and B.
template <class T, class P>
class DecodePass {
 public:
  explicit DecodePass(const Decode& f)
      : f_(f),
        x_stride_(rounded_up(f.in_features, LANES)),
        rank_stride_(rounded_up(f.r, LANES)),
        reads_x_(sizeof(T) == sizeof(float) && f.x.stride == x_stride_),
        packs_(f.sparse.values && f.tokens > ONE_AT_A_TIME),
        packed_width_(f.tokens <= LANES ? LANES : used_width(f.tokens)) {
    static thread_local Arena arena;
    float* piece[6];
    arena.cut({reads_x_ ? 0 : f.tokens * x_stride_, f.dropout.on ? f.tokens * x_stride_ : 0, f.tokens * rank_stride_,
               f.tokens * f.out_features, packs_ ? x_stride_ * BLOCK_TOKENS : 0,
               f.dropout.on ? 2 * rounded_up(f.in_features, 4) : 0},
              piece);
    x_ = reads_x_ ? (float*)f.x.data : piece[0], kept_x_ = f.dropout.on ? piece[1] : x_;
    H_ = piece[2], sums_ = piece[3], packed_ = piece[4];
    bits_ = reinterpret_cast<uint64_t*>(piece[5]);
  }

  void run() {
    if (!reads_x_) copy_panel((const T*)f_.x.data, f_.x.stride, f_.tokens, f_.in_features, x_, x_stride_);
    if (packs_) pack((const T*)f_.x.data, f_.x.stride, f_.tokens, f_.in_features, packed_, packed_width_);
    if (f_.r) shrink();
    const int64_t elements = f_.r + (f_.weight.data ? f_.in_features : 0);
    for_slots(decode_slots(f_.out_features, elements * f_.out_features, f_.sparse.nnz, f_.tokens), f_.out_features,
              [&](int64_t, int64_t begin, int64_t end) { finish(begin, end); });
  }

 private:
  static constexpr int64_t ONE_AT_A_TIME = 2;  // tokens: for more, vectors of them serve S
  static constexpr int64_t LENGTH = 1024;  // features of x that more than STRIP tokens keep in the first-level cache

  // H = scaling · dropout(x) Aᵀ.
  void shrink() {
    if (f_.dropout.on) drop();
    clear_elements(H_, f_.tokens * rank_stride_);
    const Factor<P> A{(const P*)f_.A, f_.in_features, kept_x_, x_stride_, f_.in_features};
    for_slots(decode_slots(f_.r, f_.r * f_.in_features, 0, f_.tokens), f_.r, [&](int64_t, int64_t begin, int64_t end) {
      multiply_rows_of(H_, rank_stride_, true, f_.tokens, begin, end, A);
    });
    const float scale = f_.scaling * (f_.dropout.on ? f_.dropout.scale : 1.0f);
    for (int64_t q = 0; q < f_.tokens * rank_stride_; ++q) H_[q] *= scale;
  }

  void drop() {
    copy_elements(kept_x_, x_, f_.tokens * x_stride_);
    keep_bits(f_.dropout, 0, f_.in_features, bits_);  // a bit of each for every token of a block
    for (int64_t t = 0; t < f_.tokens; ++t)
      for (int64_t i = 0; i < f_.in_features; ++i)
        if (!(bits_[i] >> t & 1)) kept_x_[t * x_stride_ + i] = 0;
  }

  // Output features [begin, end) of y.
  void finish(int64_t begin, int64_t end) {
    multiply(begin, end);
    if (f_.sparse.values) packs_ ? add_sparse(begin, end) : add_sparse_by_token(begin, end);
    for (int64_t t = 0; t < f_.tokens; ++t)
      add_bias(sums_ + t * f_.out_features + begin, f_.bias ? (const T*)f_.bias + begin : nullptr, end - begin,
               (T*)f_.y.data + t * f_.y.stride + begin);
  }

  // sums = [x H] · [weight B]ᵀ.
  void multiply(int64_t begin, int64_t end) {
    const Factor<P> B{(const P*)f_.B, f_.r, H_, rank_stride_, f_.r};
    const int64_t length = f_.tokens > STRIP ? LENGTH : f_.in_features;
    int64_t l = 0;
    do {
      const Factor<T> W{(const T*)f_.weight.data + l, f_.weight.stride, x_ + l, x_stride_,
                        f_.weight.data ? smaller(length, f_.in_features - l) : 0};
      if (l == 0)
        multiply_rows_of(sums_, f_.out_features, true, f_.tokens, begin, end, W, B);
      else
        multiply_rows_of(sums_, f_.out_features, false, f_.tokens, begin, end, W);
    } while ((l += length) < f_.in_features && f_.weight.data);
  }

  void add_sparse_by_token(int64_t begin, int64_t end) {
    const Csr& s = f_.sparse;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t t = 0; t < f_.tokens; ++t)
        for (int64_t e = s.crow[i]; e < s.crow[i + 1]; ++e)
          sums_[t * f_.out_features + i] += s.values[e] * x_[t * x_stride_ + s.col[e]];
  }

  void add_sparse(int64_t begin, int64_t end) {
    const Csr& s = f_.sparse;
    alignas(64) float tile[SPARSE_TILE * BLOCK_TOKENS];
    for (int64_t i = begin; i < end; i += SPARSE_TILE) {
      const int64_t rows = smaller(SPARSE_TILE, end - i);
      if (s.crow[i] == s.crow[i + rows]) continue;
      std::memset(tile, 0, sizeof tile);
      if (packed_width_ > LANES) ROSA_ISA::add_sparse(s, i, rows, packed_, tile, packed_width_);
      for (int64_t j = 0; packed_width_ == LANES && j < rows; ++j)
        add_rows<1, 1>(s, i + j, packed_, tile + j * BLOCK_TOKENS, LANES);
      add_transposed(tile, f_.tokens, rows, sums_ + i, f_.out_features);
    }
  }

  const Decode& f_;
  const int64_t x_stride_, rank_stride_;
  const bool reads_x_, packs_;  // x as it lies; and packed, for S
  const int64_t packed_width_;
  float *x_, *kept_x_, *H_, *sums_, *packed_;  // x token-major in fp32, and feature-major
  uint64_t* bits_;
};

}  // namespace ROSA_ISA
}  // namespace rosa
