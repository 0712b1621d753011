// The adapter's forward: one pass over x and y, a block of tokens at a time.
#pragma once
#include "cpu/adapter/epilogue.h"
#include "cpu/common/philox.h"

namespace rosa {
namespace ROSA_ISA {

inline int64_t block_count(int64_t tokens) { return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }
inline int64_t slot_count(int64_t tokens) { return smaller(thread_count(), block_count(tokens)); }
inline float low_rank_scale(const LowRank& l, const Dropout& d) { return l.scaling * (d.on ? d.scale : 1.0f); }

// Into how many parts the output features are cut where there are fewer blocks than threads. Each part packs x and
// computes H for itself, and it must be worth waking a thread, which takes some 10 us.
inline int64_t parts_of_a_block(const Forward& f, int64_t blocks, int64_t tiles) {
  constexpr int64_t PART = 1 << 18;  // multiplications
  if (blocks == 0 || blocks >= thread_count()) return 1;
  const int64_t work = smaller(f.tokens, BLOCK_TOKENS) * (f.low_rank.r * f.out_features + f.sparse.nnz);
  return larger(1, smaller(smaller(thread_count() / blocks, tiles), work / PART));
}

// Writes zeros to a fresh y. It is called block by block, where no other part of the block may add to y sooner, so that
// the block is in the cache when it is added to. memset treats long rows in a way that makes adding to them slower, so
// plain stores are used.
template <class T>
void clear_rows(const Forward& f, int64_t first, int64_t tokens) {
  constexpr int64_t VECTOR = sizeof(float) * LANES;
  const int64_t bytes = sizeof(T) * f.out_features;
  for (int64_t t = first; f.fresh_y && t < first + tokens; ++t) {
    char* const row = (char*)((T*)f.y.data + t * f.y.stride);
    int64_t b = 0;
    for (; b + VECTOR <= bytes; b += VECTOR) store((float*)(row + b), zero());
    clear_elements(row + b, bytes - b);
  }
}

// The forward of S alone, of a kind that BlockSparse serves.
template <class T>
void forward_block_sparse(const Forward& f) {
  const BlockSparse S(f.sparse, nullptr, f.out_features, f.in_features);
  const int64_t blocks = block_count(f.tokens), tiles = S.tile_count(), parts = parts_of_a_block(f, blocks, tiles);
  const int64_t step = S.tokens_at_a_time();
  const bool clears = !S.covers();
  if (clears && parts > 1) clear_rows<T>(f, 0, f.tokens);
  for_slots(smaller(thread_count(), blocks * parts), blocks * parts, [&](int64_t, int64_t begin, int64_t end) {
    static thread_local Arena arena;
    float* gathered[1];
    arena.cut({S.scratch_size()}, gathered);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / parts * BLOCK_TOKENS, part = item % parts;
      const int64_t last = smaller(block + BLOCK_TOKENS, f.tokens);
      for (int64_t first = block; first < last; first += step) {
        const int64_t tokens = smaller(step, last - first);
        const bool more = first + 2 * tokens <= f.tokens;
        if (clears && parts == 1) clear_rows<T>(f, first, tokens);
        S.gather((const T*)f.x.data + first * f.x.stride, f.x.stride, tokens, more, gathered[0]);
        S.add_tiles(gathered[0], (T*)f.y.data + first * f.y.stride, f.y.stride, tokens, more, tiles * part / parts,
                    tiles * (part + 1) / parts, f.fresh_y);
      }
    }
  });
}

template <class T>
void forward_blocks(const Forward& f) {
  const int64_t r = f.low_rank.r, padded_r = rounded_up(r, GROUP), padded_in = rounded_up(f.in_features, LANES);
  Buffer<float> shrink(padded_r * f.in_features);
  pack_groups(f.low_rank.A, f.in_features, 1, r, f.in_features, shrink);
  const Epilogue epilogue(f.low_rank.B, r, 1, r, low_rank_scale(f.low_rank, f.dropout), f.sparse, f.in_features,
                          f.out_features);
  const int64_t blocks = block_count(f.tokens);
  const int64_t parts = parts_of_a_block(f, blocks, epilogue.tile_count());
  if (parts > 1) clear_rows<T>(f, 0, f.tokens);
  for_slots(smaller(thread_count(), blocks * parts), blocks * parts, [&](int64_t, int64_t begin, int64_t end) {
    static thread_local Arena arena;
    float* piece[4];
    arena.cut({padded_in * BLOCK_TOKENS, padded_r * BLOCK_TOKENS, epilogue.scratch_size(),
               f.dropout.on ? 2 * rounded_up(f.in_features, 4) : 0},
              piece);
    float *packed = piece[0], *H = piece[1], *scratch = piece[2];
    uint64_t* bits = f.dropout.on ? reinterpret_cast<uint64_t*>(piece[3]) : nullptr;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / parts * BLOCK_TOKENS, part = item % parts;
      const int64_t tokens = smaller(BLOCK_TOKENS, f.tokens - first);
      if (parts == 1) clear_rows<T>(f, first, tokens);
      pack((const T*)f.x.data + first * f.x.stride, f.x.stride, tokens, f.in_features, packed, used_width(tokens));
      if (bits) keep_bits(f.dropout, first, f.in_features, bits);
      multiply(shrink, packed, bits, r, f.in_features, 1.0f, H, used_width(tokens));
      epilogue.add_tiles((T*)f.y.data + first * f.y.stride, f.y.stride, tokens, H, packed, nullptr, scratch,
                         epilogue.tile_count() * part / parts, epilogue.tile_count() * (part + 1) / parts);
    }
  });
}

}  // namespace ROSA_ISA
}  // namespace rosa
