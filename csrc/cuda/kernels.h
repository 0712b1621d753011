// What the CUDA kernels compute: plain structs in, one function an operation, each on the given stream of the current
// device. No torch types here. A launch that CUDA refuses comes back as its error.
#pragma once
#include <cstdint>

#ifdef ROSA_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace rosa {

enum class Dtype { float32, bfloat16, float16 };

// Row-major, unit column stride; stride counts elements and may be 0 (expanded rows).
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
  Dtype dtype = Dtype::float32;
};

// Philox dropout; see rosa_kernels/dropout.py. seed: on the device, null: none.
struct Dropout {
  const int64_t* seed = nullptr;
  uint64_t threshold = 0;  // random words below it are dropped; 2^32 drops all
  float scale = 1;         // 1 / (1 - p), and 0 for p = 1
};

// One non-zero of S, as the epilogue reads it.
struct alignas(8) PackedEntry {
  int32_t col;
  float value;
};

// out (features, padded_tokens tokens) = xᵀ, zeros beyond the tokens: tokens next to each other in memory.
// padded_tokens: a multiple of 64; out.stride = padded_tokens. Same dtypes.
struct Transpose {
  int64_t tokens, features, padded_tokens;
  Matrix out, x;
};
cudaError_t transpose(const Transpose&, cudaStream_t);

// out (tokens, count) = x[:, index]; index[p] = col[p] where col is given, else the p-th row of crow (rows + 1) that is
// not empty, each of `row_length` entries. Same dtypes.
struct GatherColumns {
  int64_t tokens, count;
  Matrix out, x;
  const int32_t* col;
  const int32_t* crow;
  int64_t rows, row_length;
};
cudaError_t gather_columns(const GatherColumns&, cudaStream_t);

// packed[e] = {col[e], values[permutation[e]]} (e itself where permutation is null). values: fp32, bf16 or fp16. After
// the last one there must be room for ENTRY_PADDING more: the epilogue fetches ahead.
constexpr int ENTRY_PADDING = 32;
struct PackEntries {
  int64_t nnz;
  PackedEntry* packed;
  const int32_t* col;
  const int32_t* permutation;
  const void* values;
  Dtype values_dtype;
};
cudaError_t pack_entries(const PackEntries&, cudaStream_t);

// H (tokens, R) = dropout(x) Aᵀ, R = r rounded up to 16, zeros beyond r; contiguous, in A's dtype. A (r, features) in
// x's dtype or fp32. partials: splits fp32 copies of H, scratch, where splits > 1.
struct Shrink {
  int64_t tokens, features, r;
  Matrix x, A;
  void* H;
  Dropout dropout;
  int splits;
  float* partials;
};
cudaError_t shrink(const Shrink&, cudaStream_t);

// out[f * stride_f + k * stride_k] = scaling · Σ_t dropout(z)[t, f] H[t, k] for k < r. H (tokens, R) as shrink makes
// it, in z's dtype or fp32; out in H's. partials: splits fp32 copies (features, R), scratch, where splits > 1.
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
  float* partials;
};
cudaError_t lora_grad(const LoraGrad&, cudaStream_t);

// y (tokens, out_features) = (its own, where accumulate) + scaling · dropout(H Bᵀ) + x Sᵀ + row_products at the rows of
// S, summed in fp32 and rounded once. Each part may be absent.
struct Epilogue {
  int64_t tokens, in_features, out_features;
  Matrix y;
  bool accumulate;
  // H (tokens, R) as shrink makes it, B[o * stride_o + k * stride_k]; both in y's dtype or both in fp32. r = 0: none.
  int64_t r;
  const void* H;
  const void* B;
  Dtype B_dtype;
  int64_t stride_o, stride_k;
  float scaling;
  Dropout dropout;
  // S (out_features, in_features) at crow; packed_entries null: none. x.data null: x_transposed (in_features,
  // padded_tokens) stands for it, else a tile of x has to fit in shared memory (epilogue_shared_bytes).
  const int32_t* crow;
  const PackedEntry* packed_entries;
  Matrix x;
  Matrix x_transposed;
  // row_products (tokens, rows) fp32: what is added at the p-th row of crow that is not empty. Null: none.
  const float* row_products;
  int64_t rows;
  int multiprocessors;
};
cudaError_t epilogue(const Epilogue&, cudaStream_t);

// out[e] (nnz) = Σ_t dy[t, row of e] x[t, col[e]] from transpose copies dy (out_features, padded_tokens), x
// (in_features, padded_tokens). partials: splits fp32 copies of out, scratch, where splits > 1.
struct Sddmm {
  int64_t padded_tokens, out_features, nnz;
  void* out;
  Dtype out_dtype;
  Matrix dy, x;
  const int32_t* crow;
  const int32_t* col;
  int splits;
  float* partials;
};
cudaError_t sddmm(const Sddmm&, cudaStream_t);

// out[e] (nnz) = matrix[row of e, col[e]], rounded to out's dtype.
struct GatherEntries {
  int64_t rows, nnz;
  void* out;
  Dtype out_dtype;
  Matrix matrix;
  const int32_t* crow;
  const int32_t* col;
};
cudaError_t gather_entries(const GatherEntries&, cudaStream_t);

// out (rows, columns) = weight + S, each entry summed in fp32 and rounded once. weight.data null: zeros; weight.data =
// out.data: in place. out and weight in one dtype; values: fp32, bf16 or fp16.
struct Densify {
  int64_t rows, columns;
  Matrix out, weight;
  const int32_t* crow;
  const int32_t* col;
  const void* values;
  Dtype values_dtype;
};
cudaError_t densify(const Densify&, cudaStream_t);

// Compiler and GPUs: "nvcc 13.0, kernels for 800,900,1000".
const char* build_info();

}  // namespace rosa
