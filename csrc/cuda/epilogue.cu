#include "epilogue.h"

#include <algorithm>

namespace rosa {
namespace {

EpilogueOperands operands_of(const Epilogue& e) {
  EpilogueOperands o{};
  o.tokens = e.tokens;
  o.in_features = static_cast<int>(e.in_features);
  o.out_features = static_cast<int>(e.out_features);
  o.y_stride = e.y.stride;
  o.y_aligned = is_aligned(e.y);
  o.accumulate = e.accumulate;
  o.r = static_cast<int>(e.r);
  o.R = static_cast<int>(ceil_div(e.r, RANK_STEP) * RANK_STEP);
  o.stride_o = e.stride_o;
  o.stride_k = e.stride_k;
  o.scaling = e.scaling;
  o.dropout = e.dropout;
  o.crow = e.crow;
  o.entries = e.entries;
  o.x_stride = e.x.stride;
  o.x_aligned = is_aligned(e.x);
  o.columns_stride = e.x_columns.stride;
  o.D = e.D;
  o.rows = e.rows;
  o.terms = e.terms;
  return o;
}

template <typename T, typename B_t, Gather GATHER>
cudaError_t launch_epilogue(const Epilogue& e, cudaStream_t stream) {
  const auto kernel = &epilogue_kernel<T, B_t, GATHER>;
  const int64_t shared = GATHER == Gather::shared ? epilogue_shared_bytes<T>(e.in_features) : 0;
  if (shared > 0) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  // As many chunks of features as give every multiprocessor two blocks.
  const int64_t tiles = ceil_div(e.tokens, EPILOGUE_TOKENS), groups = ceil_div(e.out_features, EPILOGUE_FEATURES);
  const int64_t chunks = std::min<int64_t>({ceil_div(2 * e.multiprocessors, tiles), groups, 65535});
  const int64_t groups_a_chunk = ceil_div(groups, chunks);
  EpilogueOperands operands = operands_of(e);
  operands.row_by_row = e.entries && groups_a_chunk < EPILOGUE_WARPS<B_t, GATHER> / 2;
  const Matrix& x = GATHER == Gather::global ? e.x_columns : e.x;
  ROSA_LAUNCH((epilogue_kernel<T, B_t, GATHER>), dim3(tiles, ceil_div(groups, groups_a_chunk)),
              dim3(EPILOGUE_WARPS<B_t, GATHER> * WARP), shared, stream, static_cast<T*>(e.y.data),
              static_cast<const B_t*>(e.H), static_cast<const B_t*>(e.B), static_cast<const T*>(x.data), operands,
              static_cast<int>(groups_a_chunk * EPILOGUE_FEATURES));
  return cudaGetLastError();
}

template <typename T, typename B_t>
cudaError_t launch_by_gather(const Epilogue& e, cudaStream_t stream) {
  if (!e.entries) return launch_epilogue<T, B_t, Gather::none>(e, stream);
  if (e.x_columns.data) return launch_epilogue<T, B_t, Gather::global>(e, stream);
  return launch_epilogue<T, B_t, Gather::shared>(e, stream);
}

}  // namespace

cudaError_t epilogue(const Epilogue& e, cudaStream_t stream) {
  if (e.tokens == 0 || e.out_features == 0) return cudaSuccess;
  return with_type(e.y.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (e.r == 0 || e.B_dtype == e.y.dtype) return launch_by_gather<T, T>(e, stream);
    return launch_by_gather<T, float>(e, stream);
  });
}

}  // namespace rosa
