#include "cuda/transpose.h"

#include "cuda/launch.h"

namespace rosa {

cudaError_t transpose(const Transpose& c, cudaStream_t stream) {
  if (c.features == 0 || c.padded_tokens == 0) return cudaSuccess;
  const TransposeOperands operands{c.tokens, c.features, c.out.stride, c.x.stride, is_aligned(c.out), is_aligned(c.x)};
  const dim3 grid(c.padded_tokens / TRANSPOSE_TILE * ceil_div(c.features, TRANSPOSE_TILE));
  dispatch_dtype(c.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    ROSA_LAUNCH(transpose_kernel<T>, grid, dim3(TRANSPOSE_THREADS), 0, stream, static_cast<T*>(c.out.data),
                static_cast<const T*>(c.x.data), operands);
  });
  return cudaGetLastError();
}

cudaError_t gather_columns(const GatherColumns& g, cudaStream_t stream) {
  if (g.tokens == 0 || g.count == 0) return cudaSuccess;
  const GatherColumnsOperands operands{g.tokens, g.count, g.out.stride, g.x.stride,
                                       g.col,    g.crow,  g.rows,       g.row_length};
  const dim3 grid(ceil_div(g.count, GATHER_COLUMNS) * ceil_div(g.tokens, GATHER_WARPS * GATHER_TOKENS));
  dispatch_dtype(g.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    ROSA_LAUNCH(gather_columns_kernel<T>, grid, dim3(GATHER_WARPS * WARP), 0, stream, static_cast<T*>(g.out.data),
                static_cast<const T*>(g.x.data), operands);
  });
  return cudaGetLastError();
}

}  // namespace rosa
