// The tile of sums that every product keeps in registers.
#pragma once
#include "cpu/dense/pack.h"

namespace rosa {
namespace ROSA_ISA {

// Rows of Width vectors. A tile is a local variable whose indices are all constants once the loops are unrolled, so
// that the compiler keeps it in registers.
template <int Rows, int Width>
struct RegisterTile {
  Vec sums[Rows][Width];

  // body(row, v) for every vector of the tile.
  template <class Body>
  static ROSA_INLINE void for_each(const Body& body) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) body(i, v);
  }

  ROSA_INLINE void clear() {
    for_each([&](int i, int v) { sums[i][v] = zero(); });
  }
  ROSA_INLINE void load_from(const float* from, int64_t stride) {
    for_each([&](int i, int v) { sums[i][v] = load(from + i * stride + v * LANES); });
  }
  ROSA_INLINE void store_to(float* to, int64_t stride) const {
    for_each([&](int i, int v) { store(to + i * stride + v * LANES, sums[i][v]); });
  }

  // sums[i][v] += coefficient(i) · vector(v): one step of an outer product. Each vector is loaded once; a single row
  // leaves the loads to its multiply-adds, which take an operand from memory.
  template <class Coefficient, class Vector>
  ROSA_INLINE void add_outer(const Coefficient& coefficient, const Vector& vector) {
    if constexpr (Rows == 1) {
      const Vec c = broadcast(coefficient(0));
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) sums[0][v] = fma(c, vector(v), sums[0][v]);
    } else {
      Vec vectors[Width];
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) vectors[v] = vector(v);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vec c = broadcast(coefficient(i));
#pragma GCC unroll 8
        for (int v = 0; v < Width; ++v) sums[i][v] = fma(c, vectors[v], sums[i][v]);
      }
    }
  }
};

}  // namespace ROSA_ISA
}  // namespace rosa
