// Sums over a split dimension: each split wrote an fp32 part; they are added in order and rounded once.
#pragma once
#include "cuda/device_functions.h"
#include "cuda/launch.h"

namespace rosa {

// Where a matrix (rows, columns) of sums goes: element (i, k) to data[i * stride_row + k * stride_column], times scale.
struct SumTarget {
  void* data;
  Dtype dtype;
  int64_t stride_row, stride_column;
  int64_t columns;  // those of the parts beyond are padding
  float scale;
};

// parts (splits, rows, width) -> target (rows, target.columns)
template <typename T>
__global__ void sum_parts_kernel(SumTarget target, const float* parts, int64_t rows, int64_t width, int splits) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = at / width, column = at % width;
  if (row >= rows || column >= target.columns) return;
  float total = 0;
  for (int split = 0; split < splits; ++split) total += parts[split * rows * width + at];
  static_cast<T*>(target.data)[row * target.stride_row + column * target.stride_column] =
      rounded<T>(total * target.scale);
}

inline cudaError_t sum_parts(const SumTarget& target, const float* parts, int64_t rows, int64_t width, int splits,
                             cudaStream_t stream) {
  constexpr int THREADS = 256;
  const dim3 grid(ceil_div(rows * width, THREADS));
  with_type(target.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    ROSA_LAUNCH(sum_parts_kernel<T>, grid, dim3(THREADS), 0, stream, target, parts, rows, width, splits);
  });
  return cudaGetLastError();
}

}  // namespace rosa
