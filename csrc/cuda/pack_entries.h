// Entries of S as the epilogue reads them: column and value next to each other.
#pragma once
#include "cuda/device_functions.h"
#include "cuda/kernels.h"

namespace rosa {

constexpr int PACK_THREADS = 256;

template <typename V>
__global__ void __launch_bounds__(PACK_THREADS)
    pack_entries_kernel(PackedEntry* packed, const int32_t* col, const int32_t* permutation, const V* values,
                        int64_t nnz) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * PACK_THREADS + threadIdx.x;
  if (e >= nnz) return;
  packed[e] = {col[e], widened(values[permutation ? permutation[e] : e])};
}

}  // namespace rosa
