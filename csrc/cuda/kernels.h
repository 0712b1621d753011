// What the CUDA kernels compute. Each operation is a struct of its operands and a function that launches its kernels on
// a stream of the current device. Torch's types end in checked_launches.cpp. A launch that CUDA refuses comes back as
// its error.
//
// Sizes: tokens is T in the documentation (in C++ T is a dtype), nnz counts the entries of S, r is the rank, and R is r
// rounded up to RANK_STEP. features are in_features where x is multiplied and out_features where dy is. For dx the
// operations run on dy and the transposed matrices, so that in_features there are the layer's out_features.
#pragma once
#include <cstdint>

#include "cuda/constants.h"

#ifdef ROSA_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace rosa {

enum class Dtype { float32, bfloat16, float16 };

// A row-major matrix of unit column stride. Its stride counts elements, and is 0 where all rows are the same one.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::float32;
};

// Whether every row begins at a multiple of 16 bytes, so that one access may read or write 16 bytes of it.
inline bool is_aligned(const Matrix& m) {
  const int64_t size = m.dtype == Dtype::float32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * size % 16 == 0;
}

// Dropout by Philox, as rosa_kernels/dropout.py says. The seed lies on the device; where it is null nothing is dropped.
struct Dropout {
  const int64_t* seed = nullptr;
  uint64_t threshold = 0;  // Numbers whose random words are below it are dropped; 2^32 drops all.
  float scale = 1;         // 1 / (1 - p), and 0 for p = 1
};

// One non-zero of S, as the epilogue reads it.
struct alignas(8) PackedEntry {
  int32_t col;
  float value;
};
static_assert(sizeof(PackedEntry) == PACKED_ENTRY_BYTES, "as kernel_calls.cpp allocates them");

// out (features, padded_tokens) = xᵀ, and zeros beyond the tokens. padded_tokens is a multiple of TOKEN_PADDING and
// out's stride. out and x have one dtype.
struct Transpose {
  int64_t tokens, features, padded_tokens;
  Matrix out, x;
};
cudaError_t transpose(const Transpose&, cudaStream_t);

// out (tokens, count) = x[:, index]. index is col where col is given. Else index[p] is the p-th row of crow (rows + 1)
// that is not empty, and each such row has row_length entries. out and x have one dtype.
struct GatherColumns {
  int64_t tokens, count;
  Matrix out, x;
  const int32_t* col;
  const int32_t* crow;
  int64_t rows, row_length;
};
cudaError_t gather_columns(const GatherColumns&, cudaStream_t);

// packed[e] = {col[e], values[permutation[e]]}, or values[e] where permutation is null. values are fp32, bf16 or fp16.
// Behind the nnz entries there must be room for ENTRY_PADDING more.
struct PackEntries {
  int64_t nnz;
  PackedEntry* packed;
  const int32_t* col;
  const int32_t* permutation;
  const void* values;
  Dtype values_dtype;
};
cudaError_t pack_entries(const PackEntries&, cudaStream_t);

// out[row * row_stride + term * term_stride + column] = the terms of an fp32 matrix (rows, columns): SPLIT_TERMS
// numbers of bf16 each, the largest first, whose sum it is.
struct SplitTerms {
  int64_t rows, columns;
  const float* matrix;
  int64_t matrix_row_stride, matrix_column_stride;
  void* out;
  int64_t row_stride, term_stride;
};
cudaError_t split_terms(const SplitTerms&, cudaStream_t);

// H (tokens, R) = dropout(x) Aᵀ, and zeros beyond r. H is contiguous and in A's dtype. A (r, features) is in x's dtype
// or fp32. Where splits > 1, parts is scratch memory for that many fp32 copies of H.
struct Shrink {
  int64_t tokens, features, r;
  Matrix x, A;
  void* H;
  Dropout dropout;
  int splits;
  float* parts;
};
cudaError_t shrink(const Shrink&, cudaStream_t);

// out[f * stride_f + k * stride_k] = scaling · Σ_t dropout(z)[t, f] H[t, k] for k < r: dB from z = dy, dAᵀ from z = x
// with dH as H. H (tokens, R) comes from shrink, in z's dtype or fp32; out has H's dtype. Where splits > 1, parts is
// scratch memory for that many fp32 matrices (features, R).
struct LoraGrad {
  int64_t tokens, features, r;
  Matrix z;
  const void* H;
  Dtype H_dtype;
  void* out;
  int64_t stride_f, stride_k;
  float scaling;
  Dropout dropout;
  int splits;
  float* parts;
};
cudaError_t lora_grad(const LoraGrad&, cudaStream_t);

// y (tokens, out_features) = (y, where accumulate, +) bias + scaling · dropout(H Bᵀ) + x Sᵀ, summed in fp32 and rounded
// once. Each part may be absent.
struct Epilogue {
  int64_t tokens, in_features, out_features;
  Matrix y;
  bool accumulate;
  const void* bias;  // (out_features) in y's dtype
  // H (tokens, R) comes from shrink; B is B[o * stride_o + k * stride_k]. Both are in y's dtype or both in fp32. There
  // is no such part where r = 0.
  int64_t r;
  const void* H;
  const void* B;
  Dtype B_dtype;
  int64_t stride_o, stride_k;
  float scaling;
  Dropout dropout;
  // S (out_features, in_features) has packed_entries, or none where that is null. A block's tokens of x have to fit in
  // shared memory (epilogue_shared_bytes); where they do not, x.data is null and x_transposed (in_features,
  // padded_tokens) stands for x.
  const int32_t* crow;
  const PackedEntry* packed_entries;
  Matrix x;
  Matrix x_transposed;
  // Where S has whole rows, a library GEMM made row_products (tokens, row_terms · rows) fp32 of x and S, whose rows are
  // row_stride apart. Its columns p, rows + p, ... are added at the p-th row of crow that is not empty: one for each
  // term of S. Null stands for none.
  const float* row_products;
  int64_t rows, row_stride;
  int row_terms;
  int multiprocessors;
};
cudaError_t epilogue(const Epilogue&, cudaStream_t);

// out[e] (nnz) = Σ_t dy[row of e, t] x[col[e], t]. Here dy (out_features, padded_tokens) and x (in_features,
// padded_tokens) come from transpose. Where splits > 1, parts is scratch memory for that many fp32 copies of out.
struct Sddmm {
  int64_t padded_tokens, out_features, nnz;
  void* out;
  Dtype out_dtype;
  Matrix dy, x;
  const int32_t* crow;
  const int32_t* col;
  int splits;
  float* parts;
};
cudaError_t sddmm(const Sddmm&, cudaStream_t);

// out[e] (nnz) = matrix[row of e, col[e]], of the same dtype.
struct GatherEntries {
  int64_t rows, nnz;
  void* out;
  Matrix matrix;
  const int32_t* crow;
  const int32_t* col;
};
cudaError_t gather_entries(const GatherEntries&, cudaStream_t);

// out (rows, columns) = weight + S, each entry summed in fp32 and rounded once. Where weight.data is null, zeros stand
// for the weight; it may be out.data. out and weight have one dtype; values are fp32, bf16 or fp16.
struct Densify {
  int64_t rows, columns;
  Matrix out, weight;
  const int32_t* crow;
  const int32_t* col;
  const void* values;
  Dtype values_dtype;
};
cudaError_t densify(const Densify&, cudaStream_t);

// The compiler and the GPUs that the kernels are for: "nvcc 13.0, kernels for 800,900,1000".
const char* build_info();

}  // namespace rosa
