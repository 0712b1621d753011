// The kernels of one instruction set. kernels.cpp includes this file after the header of the set.
#pragma once
#include "cpu/adapter/backward.h"
#include "cpu/adapter/decode.h"
#include "cpu/adapter/gemm.h"
#include "cpu/adapter/merge.h"

namespace rosa {
namespace ROSA_ISA {

constexpr bool MULTIPLIES_WEIGHT = false;

template <class T>
void forward_typed(const Forward& f) {
  if (!f.low_rank.r && BlockSparse::serves(f.sparse))
    forward_block_sparse<T>(f);
  else
    forward_blocks<T>(f);
}

template <class T>
void decode_typed(const Decode& f) {
  f.adapter_dtype == Dtype::float32 ? DecodePass<T, float>(f).run() : DecodePass<T, uint16_t>(f).run();
}

inline void decode(const Decode& f) { f.dtype == Dtype::float32 ? decode_typed<float>(f) : decode_typed<uint16_t>(f); }
inline void forward(const Forward& f) {
  f.dtype == Dtype::float32 ? forward_typed<float>(f) : forward_typed<uint16_t>(f);
}
inline void backward(const Backward& b) {
  b.dtype == Dtype::float32 ? BackwardSweep<float>(b).run() : BackwardSweep<uint16_t>(b).run();
}
inline void merge(const Merge& m) {
  if (m.weight_dtype == Dtype::float32)
    merge_rows<float, float>(m);
  else if (m.out_dtype == Dtype::float32)
    merge_rows<uint16_t, float>(m);
  else
    merge_rows<uint16_t, uint16_t>(m);
}

}  // namespace ROSA_ISA
}  // namespace rosa
