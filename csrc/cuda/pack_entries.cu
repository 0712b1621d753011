#include "cuda/pack_entries.h"

#include "cuda/launch.h"

namespace rosa {

cudaError_t pack_entries(const PackEntries& p, cudaStream_t stream) {
  if (p.nnz == 0) return cudaSuccess;
  dispatch_dtype(p.values_dtype, [&](auto type) {
    using V = typename decltype(type)::type;
    ROSA_LAUNCH(pack_entries_kernel<V>, dim3(ceil_div(p.nnz, PACK_THREADS)), dim3(PACK_THREADS), 0, stream, p.packed,
                p.col, p.permutation, static_cast<const V*>(p.values), p.nnz);
  });
  return cudaGetLastError();
}

}  // namespace rosa
