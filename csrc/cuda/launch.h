// What the functions that launch kernels share.
#pragma once
#include <algorithm>

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

// A grid of so many blocks. CUDA refuses one that is too large; a number cut to 32 bits might pass for a smaller one.
inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  const auto saturated = [](int64_t n) { return static_cast<unsigned>(std::min<int64_t>(n, UINT32_MAX)); };
  return dim3(saturated(x), saturated(y), saturated(z));
}

}  // namespace rosa
