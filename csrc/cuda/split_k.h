// Sums over a split dimension: each split wrote an fp32 part; they are added in order and rounded once.
#pragma once
#include "cuda/device_functions.h"
#include "cuda/launch.h"

namespace rosa {

// Where a matrix (rows, columns) of sums goes: element (i, k) to data[i * stride_row + k * stride_column], times scale.
struct SumOutput {
  void* data;
  Dtype dtype;
  int64_t stride_row, stride_column;
  int64_t columns;  // those of the partials beyond are padding
  float scale;
};

// partials (splits, rows, width) -> out (rows, out.columns)
template <typename T>
__global__ void sum_partials_kernel(SumOutput out, const float* partials, int64_t rows, int64_t width, int splits) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = at / width, column = at % width;
  if (row >= rows || column >= out.columns) return;
  float total = 0;
  for (int split = 0; split < splits; ++split) total += partials[split * rows * width + at];
  static_cast<T*>(out.data)[row * out.stride_row + column * out.stride_column] = rounded<T>(total * out.scale);
}

inline cudaError_t sum_partials(const SumOutput& out, const float* partials, int64_t rows, int64_t width, int splits,
                                cudaStream_t stream) {
  constexpr int THREADS = 256;
  const dim3 grid(ceil_div(rows * width, THREADS));
  dispatch_dtype(out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    ROSA_LAUNCH(sum_partials_kernel<T>, grid, dim3(THREADS), 0, stream, out, partials, rows, width, splits);
  });
  return cudaGetLastError();
}

}  // namespace rosa
