// Included by kernels.cpp for a set with instructions for bfloat16: what they serve, and for the rest the kernels of
// ROSA_OTHERS, a set that every processor with this one has.
#pragma once
#include "cpu/adapter/backward_bf16.h"
#include "cpu/adapter/forward_bf16.h"

namespace rosa {
namespace ROSA_ISA {

inline void few_tokens(const FewTokens& f) { ROSA_OTHERS.few_tokens(f); }
inline void forward(const Forward& f) {
  const bool served = f.weight.data || (f.dtype == Dtype::bfloat16 && f.low_rank.r);
  served ? forward_pairs(f) : ROSA_OTHERS.forward(f);
}
inline void backward(const Backward& b) {
  const bool served = b.weight.data || (b.dtype == Dtype::bfloat16 && b.low_rank.r && (b.dA || b.dB || b.dx.data));
  served ? BackwardPairs(b).run() : ROSA_OTHERS.backward(b);
}
inline void merge(const Merge& m) { ROSA_OTHERS.merge(m); }
inline void product(const Product& p) { ROSA_OTHERS.product(p); }

}  // namespace ROSA_ISA
}  // namespace rosa
