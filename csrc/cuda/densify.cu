#include "cuda/densify.h"

#include <algorithm>

#include "cuda/launch.h"

namespace rosa {
namespace {

template <typename T>
DensifyOperands operands_of(const Densify& s) {
  const int64_t pieces = ceil_div(s.columns, DENSIFY_TILE<T>);
  const int64_t tile_columns = ceil_div(ceil_div(s.columns, pieces), Vector<T>::SIZE) * Vector<T>::SIZE;
  return {s.rows,
          s.columns,
          std::max<int64_t>(1, DENSIFY_TILE<T> / s.columns),
          tile_columns,
          s.out.stride,
          s.weight.stride,
          is_aligned(s.out),
          is_aligned(s.weight),
          s.crow,
          s.col};
}

}  // namespace

cudaError_t densify(const Densify& s, cudaStream_t stream) {
  if (s.rows == 0 || s.columns == 0) return cudaSuccess;
  dispatch_dtype(s.out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DensifyOperands operands = operands_of<T>(s);
    const dim3 grid(ceil_div(s.rows, operands.tile_rows) * ceil_div(s.columns, operands.tile_columns));
    dispatch_dtype(s.values_dtype, [&](auto values_type) {
      using V = typename decltype(values_type)::type;
      ROSA_LAUNCH((densify_kernel<T, V>), grid, dim3(DENSIFY_THREADS), 0, stream, static_cast<T*>(s.out.data),
                  static_cast<const T*>(s.weight.data), static_cast<const V*>(s.values), operands);
    });
  });
  return cudaGetLastError();
}

}  // namespace rosa
