// The second step of a sum that several blocks share. Where the tiles of a result are too few to fill the GPU, the axis
// that is summed is split, and each split writes its part of the sums in fp32. add_parts adds these in order and rounds
// once. No atomic adds floats, so that every run gives the same bits. Launchers of shrink, lora_grad and sddmm call it.
#pragma once
#include "cuda/device_functions.h"
#include "cuda/launch.h"

namespace rosa {

// Where a matrix (rows, columns) of sums goes: scale times element (i, k) to data[i * stride_row + k * stride_column].
struct SumOutput {
  void* data;
  Dtype dtype;
  int64_t stride_row, stride_column;
  int64_t columns;  // Further columns of the parts are padding.
  float scale;
};

// Adds parts (splits, rows, width) into out (rows, out.columns). A thread has one element.
template <typename T>
__global__ void add_parts_kernel(SumOutput out, const float* parts, int64_t rows, int64_t width, int splits) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = at / width, column = at % width;
  if (row >= rows || column >= out.columns) return;
  float total = 0;
  for (int split = 0; split < splits; ++split) total += parts[split * rows * width + at];
  static_cast<T*>(out.data)[row * out.stride_row + column * out.stride_column] = rounded<T>(total * out.scale);
}

inline cudaError_t add_parts(const SumOutput& out, const float* parts, int64_t rows, int64_t width, int splits,
                             cudaStream_t stream) {
  constexpr int THREADS = 256;
  const dim3 grid = grid_of(ceil_div(rows * width, THREADS));
  dispatch_dtype(out.dtype, [&](auto number) {
    using T = decltype(number);
    ROSA_LAUNCH(add_parts_kernel<T>, grid, dim3(THREADS), 0, stream, out, parts, rows, width, splits);
  });
  return cudaGetLastError();
}

}  // namespace rosa
