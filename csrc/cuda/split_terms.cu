// Splits an fp32 matrix into bf16 terms, so that a library GEMM multiplies bf16 numbers by it and loses nothing. A
// thread splits one number.
#include "cuda/device_functions.h"
#include "cuda/launch.h"

namespace rosa {

constexpr int SPLIT_THREADS = 256;

__global__ void __launch_bounds__(SPLIT_THREADS) split_terms_kernel(__nv_bfloat16* out, SplitTerms s) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * SPLIT_THREADS + threadIdx.x;
  if (at >= s.rows * s.columns) return;
  const int64_t row = at / s.columns, column = at % s.columns;
  __nv_bfloat16 terms[SPLIT_TERMS];
  split(s.matrix[row * s.matrix_row_stride + column * s.matrix_column_stride], terms);
#pragma unroll
  for (int i = 0; i < SPLIT_TERMS; ++i) out[row * s.row_stride + i * s.term_stride + column] = terms[i];
}

cudaError_t split_terms(const SplitTerms& s, cudaStream_t stream) {
  if (s.rows == 0 || s.columns == 0) return cudaSuccess;
  ROSA_LAUNCH(split_terms_kernel, grid_of(ceil_div(s.rows * s.columns, SPLIT_THREADS)), dim3(SPLIT_THREADS), 0, stream,
              static_cast<__nv_bfloat16*>(s.out), s);
  return cudaGetLastError();
}

}  // namespace rosa
