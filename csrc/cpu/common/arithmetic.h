// Integer and bfloat16 arithmetic of single numbers. All of it lives in its instruction set's namespace, as everything
// that the kernels include does, but for the plain structs of kernels.h: the linker must never pick code compiled for a
// newer processor for an older one.
#pragma once
#include <cstdint>
#include <cstring>

// Tiles of sums stay in registers only where the function that holds them inlines all that touches them. The compiler's
// own choice changes with the size of the rest of the file.
#define ROSA_INLINE inline __attribute__((always_inline))

namespace rosa {
namespace ROSA_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float as_float(float a) { return a; }
inline float as_float(uint16_t a) {  // bfloat16
  const uint32_t bits = (uint32_t)a << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace ROSA_ISA
}  // namespace rosa
