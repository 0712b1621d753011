// Puts the column and the fp32 value of each entry of S next to each other, so that the epilogue reads an entry in one
// access of 8 bytes. A thread packs one entry. For dx, permutation brings the values into the order of Sᵀ.
#include "cuda/device_functions.h"
#include "cuda/launch.h"

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

cudaError_t pack_entries(const PackEntries& p, cudaStream_t stream) {
  if (p.nnz == 0) return cudaSuccess;
  dispatch_dtype(p.values_dtype, [&](auto number) {
    using V = decltype(number);
    ROSA_LAUNCH(pack_entries_kernel<V>, grid_of(ceil_div(p.nnz, PACK_THREADS)), dim3(PACK_THREADS), 0, stream, p.packed,
                p.col, p.permutation, static_cast<const V*>(p.values), p.nnz);
  });
  return cudaGetLastError();
}

}  // namespace rosa
