#include "cuda/sddmm.h"

#include "cuda/split_k.h"

namespace rosa {
namespace {

template <typename T, typename O>
void launch_sddmm(O* out, const Sddmm& s, cudaStream_t stream) {
  const int64_t tokens = ceil_div(ceil_div(s.padded, s.splits), SDDMM_STEP<T>) * SDDMM_STEP<T>;
  const SddmmOperands operands{s.padded, s.out_features, s.nnz, tokens, s.dy.stride, s.x.stride, s.crow, s.col};
  const dim3 grid(ceil_div(s.nnz, SDDMM_WARPS * SDDMM_ENTRIES), s.splits);
  ROSA_LAUNCH((sddmm_kernel<T, O>), grid, dim3(SDDMM_WARPS * WARP), 0, stream, out, static_cast<const T*>(s.dy.data),
              static_cast<const T*>(s.x.data), operands);
}

}  // namespace

cudaError_t sddmm(const Sddmm& s, cudaStream_t stream) {
  if (s.nnz == 0) return cudaSuccess;
  if (!is_aligned(s.dy) || !is_aligned(s.x)) return cudaErrorInvalidValue;  // no copies of by_columns
  with_type(s.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (s.splits > 1) return launch_sddmm<T, float>(s.parts, s, stream);
    with_type(s.out_dtype, [&](auto out_type) {
      using O = typename decltype(out_type)::type;
      launch_sddmm<T, O>(static_cast<O*>(s.out), s, stream);
    });
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || s.splits <= 1) return error;
  return sum_parts({s.out, s.out_dtype, 1, 1, 1, 1.0f}, s.parts, s.nnz, 1, s.splits, stream);
}

cudaError_t pick(const Pick& p, cudaStream_t stream) {
  if (p.nnz == 0) return cudaSuccess;
  const PickOperands operands{p.rows, p.nnz, p.matrix.stride, p.crow, p.col};
  const dim3 grid(ceil_div(p.nnz, PICK_THREADS * PICK_ENTRIES));
  with_type(p.matrix.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_type(p.out_dtype, [&](auto out_type) {
      using O = typename decltype(out_type)::type;
      ROSA_LAUNCH((pick_kernel<T, O>), grid, dim3(PICK_THREADS), 0, stream, static_cast<O*>(p.out),
                  static_cast<const T*>(p.matrix.data), operands);
    });
  });
  return cudaGetLastError();
}

}  // namespace rosa
