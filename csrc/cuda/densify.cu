#include "cuda/densify.h"

#include <algorithm>

#include "cuda/launch.h"

namespace rosa {
namespace {

template <typename T>
ScatterOperands operands_of(const Scatter& s) {
  const int64_t pieces = ceil_div(s.columns, SCATTER_TILE<T>);
  const int64_t tile_columns = ceil_div(ceil_div(s.columns, pieces), Vector<T>::SIZE) * Vector<T>::SIZE;
  return {s.rows,
          s.columns,
          std::max<int64_t>(1, SCATTER_TILE<T> / s.columns),
          tile_columns,
          s.out.stride,
          s.base.stride,
          is_aligned(s.out),
          is_aligned(s.base),
          s.crow,
          s.col};
}

}  // namespace

cudaError_t scatter(const Scatter& s, cudaStream_t stream) {
  if (s.rows == 0 || s.columns == 0) return cudaSuccess;
  with_type(s.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const ScatterOperands operands = operands_of<T>(s);
    const dim3 grid(ceil_div(s.rows, operands.tile_rows) * ceil_div(s.columns, operands.tile_columns));
    with_type(s.values_dtype, [&](auto values_type) {
      using V = typename decltype(values_type)::type;
      ROSA_LAUNCH((scatter_kernel<T, V>), grid, dim3(SCATTER_THREADS), 0, stream, static_cast<T*>(s.out.data),
                  static_cast<const T*>(s.base.data), static_cast<const V*>(s.values), operands);
    });
  });
  return cudaGetLastError();
}

}  // namespace rosa
