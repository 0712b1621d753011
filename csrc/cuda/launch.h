// What the functions that launch kernels share.
#pragma once
#include "cuda/kernels.h"
#include "cuda/platform.h"

namespace rosa {

// Calls f with a number of the dtype's type.
template <typename F>
auto dispatch_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::bfloat16:
      return f(__nv_bfloat16{});
    case Dtype::float16:
      return f(__half{});
    default:
      return f(0.0f);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every row begins at a multiple of 16 bytes, so that one access may read or write 16 bytes of it.
inline bool is_aligned(const Matrix& m) {
  const int64_t size = m.dtype == Dtype::float32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * size % 16 == 0;
}

}  // namespace rosa
