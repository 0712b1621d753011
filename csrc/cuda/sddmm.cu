#include "cuda/sddmm.h"

#include "cuda/split_k.h"

namespace rosa {
namespace {

template <typename T, typename O>
void launch_sddmm(O* out, const Sddmm& s, cudaStream_t stream) {
  const int64_t tokens = ceil_div(ceil_div(s.padded_tokens, s.splits), SDDMM_STEP<T>) * SDDMM_STEP<T>;
  const SddmmOperands operands{s.padded_tokens, s.out_features, s.nnz, tokens, s.dy.stride, s.x.stride, s.crow, s.col};
  const dim3 grid(ceil_div(s.nnz, SDDMM_BLOCK_ENTRIES), s.splits);
  ROSA_LAUNCH((sddmm_kernel<T, O>), grid, dim3(SDDMM_WARPS * WARP), 0, stream, out, static_cast<const T*>(s.dy.data),
              static_cast<const T*>(s.x.data), operands);
}

}  // namespace

cudaError_t sddmm(const Sddmm& s, cudaStream_t stream) {
  if (s.nnz == 0) return cudaSuccess;
  if (!is_aligned(s.dy) || !is_aligned(s.x)) return cudaErrorInvalidValue;  // not as transpose lays them out
  dispatch_dtype(s.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (s.splits > 1) return launch_sddmm<T, float>(s.partials, s, stream);
    dispatch_dtype(s.out_dtype, [&](auto out_type) {
      using O = typename decltype(out_type)::type;
      launch_sddmm<T, O>(static_cast<O*>(s.out), s, stream);
    });
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || s.splits <= 1) return error;
  return sum_partials({s.out, s.out_dtype, 1, 1, 1, 1.0f}, s.partials, s.nnz, 1, s.splits, stream);
}

cudaError_t gather_entries(const GatherEntries& p, cudaStream_t stream) {
  if (p.nnz == 0) return cudaSuccess;
  const GatherEntriesOperands operands{p.rows, p.nnz, p.matrix.stride, p.crow, p.col};
  const dim3 grid(ceil_div(p.nnz, GATHER_ENTRIES_THREADS * GATHER_ENTRIES_A_THREAD));
  dispatch_dtype(p.matrix.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dtype(p.out_dtype, [&](auto out_type) {
      using O = typename decltype(out_type)::type;
      ROSA_LAUNCH((gather_entries_kernel<T, O>), grid, dim3(GATHER_ENTRIES_THREADS), 0, stream, static_cast<O*>(p.out),
                  static_cast<const T*>(p.matrix.data), operands);
    });
  });
  return cudaGetLastError();
}

}  // namespace rosa
