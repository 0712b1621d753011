// The adapter's forward: one pass over x and y, a block of tokens at a time.
#pragma once
#include "philox.h"
#include "update.h"

namespace rosa {
namespace ROSA_ISA {

inline int64_t block_count(int64_t tokens) { return (tokens + TOKENS - 1) / TOKENS; }
inline int64_t slot_count(int64_t tokens) { return smaller(thread_count(), block_count(tokens)); }
inline float low_rank_scale(const LowRank& l, const Dropout& d) { return l.scaling * (d.on ? d.scale : 1.0f); }

template <class T>
void forward_blocks(const Forward& f) {
  const int64_t r = f.low_rank.r, padded_r = rounded_up(r, GROUP), padded_in = rounded_up(f.in_features, LANES);
  Buffer<float> shrink(padded_r * f.in_features);
  pack_groups(f.low_rank.A, f.in_features, 1, r, f.in_features, shrink);
  const Update update(f.low_rank.B, r, 1, r, low_rank_scale(f.low_rank, f.dropout), f.sparse, f.in_features,
                      f.out_features);
  for_slots(slot_count(f.tokens), block_count(f.tokens), [&](int64_t, int64_t begin, int64_t end) {
    static thread_local Arena arena;
    float* piece[4];
    arena.cut({padded_in * TOKENS, padded_r * TOKENS, update.scratch_size(),
               f.dropout.on ? 2 * rounded_up(f.in_features, 4) : 0},
              piece);
    float *packed = piece[0], *ranks = piece[1], *scratch = piece[2];
    uint64_t* bits = f.dropout.on ? reinterpret_cast<uint64_t*>(piece[3]) : nullptr;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * TOKENS, tokens = smaller(TOKENS, f.tokens - first);
      pack((const T*)f.x.data + first * f.x.stride, f.x.stride, tokens, f.in_features, packed);
      if (bits) keep_bits(f.dropout, first, f.in_features, bits);
      multiply(shrink, packed, bits, r, f.in_features, 1.0f, ranks);
      update.add_to((T*)f.y.data + first * f.y.stride, f.y.stride, tokens, ranks, packed, nullptr, scratch);
    }
  });
}

}  // namespace ROSA_ISA
}  // namespace rosa
