// Tiles of AMX: registers of up to 16 rows of 64 bytes (Intel's manual: LDTILECFG, TILELOADD, TDPBF16PS). They are
// written in assembly, because gcc's intrinsics take no constants but literals.
#pragma once
#include <cstdint>

#define ROSA_BF16_DOT "cpu/dense/bf16_dot_amx.h"
#include "cpu/isa/amx_tile_config.h"
#include "cpu/isa/avx512bf16.h"

namespace rosa {
namespace ROSA_ISA {

inline void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
inline void tile_release() { __asm__ volatile("tilerelease"); }

template <int Tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
// Rows lie `stride` bytes apart.
template <int Tile>
inline void tile_load(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}
// Sum[m][n] += Σ_k A[m][k] · B[k][n] over pairs k of bfloat16, in fp32; denormals are zeros.
template <int Sum, int A, int B>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

}  // namespace ROSA_ISA
}  // namespace rosa
