// The kernels of an instruction set for bfloat16; kernels.cpp includes this file after the header of the set and
// the one that ROSA_BF16_DOT names. What the
// set does not serve goes to the kernels of ROSA_OTHERS, a set that every processor with this one has.
#pragma once
#include "cpu/adapter/backward_bf16.h"
#include "cpu/adapter/forward_bf16.h"

namespace rosa {
namespace ROSA_ISA {

inline void decode(const Decode& f) { ROSA_OTHERS.decode(f); }
inline void forward(const Forward& f) {
  const bool served = f.weight.data || (f.dtype == Dtype::bfloat16 && f.low_rank.r);
  served ? forward_bf16(f) : ROSA_OTHERS.forward(f);
}
inline void backward(const Backward& b) {
  const bool served = b.weight.data || (b.dtype == Dtype::bfloat16 && b.low_rank.r && (b.dA || b.dB || b.dx.data));
  served ? BackwardBf16(b).run() : ROSA_OTHERS.backward(b);
}
inline void merge(const Merge& m) { ROSA_OTHERS.merge(m); }
inline void gemm(const Gemm& p) { ROSA_OTHERS.gemm(p); }

}  // namespace ROSA_ISA
}  // namespace rosa
