// Puts the column and the fp32 value of each entry of S next to each other, so that the epilogue reads an entry in one
// access of 8 bytes. A thread packs one entry. For dx, permutation brings the values into the order of Sᵀ.
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
