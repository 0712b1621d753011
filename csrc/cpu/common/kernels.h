// The CPU kernels' interface: plain structs in, one table of functions per instruction set. No torch types here.
#pragma once
#include <cstdint>

namespace rosa {

// The kernels take the tokens by blocks of so many: 64 tokens of one feature fill four AVX-512 registers.
constexpr int64_t BLOCK_TOKENS = 64;

enum class Dtype { float32, bfloat16 };

// A row-major matrix of unit column stride; `stride` counts elements from one row to the next.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};

// scaling · B A, with A (r, in_features) and B (out_features, r) contiguous. There is none where r = 0.
struct LowRank {
  int64_t r = 0;
  const float* A = nullptr;
  const float* B = nullptr;
  float scaling = 0;
  bool bfloat16 = false;  // both hold bfloat16 numbers, widened to float
};

// Philox dropout of the low-rank path's input; rosa_kernels/dropout.py defines it.
struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint64_t threshold = 0;  // random words below it are dropped; 2^32 drops all
  float scale = 1;         // 1 / (1 - p), and 0 for p = 1
};

// The numbers are those of rosa_kernels/pattern.py.
enum class Structure { unstructured, row, column, block, block16 };

// S (out_features, in_features) in CSR form. There is none where values is null.
struct Csr {
  const int32_t* crow = nullptr;
  const int32_t* col = nullptr;
  const float* values = nullptr;
  int64_t nnz = 0;
  Structure structure = Structure::unstructured;
};

// y (tokens, out_features) += scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ. With fresh_y, which S alone may come with, y is
// written instead of added to. A weight (out_features, in_features) adds x weightᵀ + bias, and y is written then too.
// Only tables that say multiplies_weight take a weight, and for bfloat16 x alone.
struct Forward {
  Dtype dtype;
  int64_t tokens, in_features, out_features;
  Matrix y, x, weight;
  const void* bias;
  bool fresh_y;
  LowRank low_rank;
  Dropout dropout;
  Csr sparse;
};

// y (tokens, out_features) = x weightᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ, any of which may be missing, but not
// all. weight (out_features, in_features) and bias are of dtype; A (r, in_features) and B (out_features, r) of
// adapter_dtype, contiguous.
struct Decode {
  Dtype dtype, adapter_dtype;
  int64_t tokens, in_features, out_features, r;
  Matrix y, x, weight;
  const void *bias, *A, *B;
  float scaling;
  Dropout dropout;
  Csr sparse;
};

// Adds to dx and writes the other gradients; a null output is not wanted. dA is (r, in_features), dB (out_features, r),
// dvalues (nnz,). If there is a weight, dy · weight is part of
// dx, and dx is overwritten, not added to. Forward states the conditions.
struct Backward {
  Dtype dtype;
  int64_t tokens, in_features, out_features;
  Matrix dx, dy, x, weight;
  LowRank low_rank;
  Dropout dropout;
  Csr sparse;
  const int32_t *ccol, *row, *permutation;  // the CSC view, for dx
  float *dA, *dB, *dvalues;
};

// out (rows, columns) = (weight + scaling · B A + S)[first_row : first_row + rows, first_column : first_column +
// columns]; out is float32, or of the weight's dtype where r = 0.
struct Merge {
  Dtype weight_dtype, out_dtype;
  int64_t in_features;  // of the whole weight
  int64_t first_row, rows, first_column, columns;
  Matrix out, weight;
  LowRank low_rank;
  Csr sparse;
};

// y (tokens, rows) = x · stripᵀ + bias, or transposed y (tokens, columns) = x · strip + bias, for the strip that the
// weight says; all float32. There is no bias where it is null.
struct Gemm {
  int64_t tokens;
  Matrix y, x;
  const float* bias;
  bool transposed;
  Merge weight;  // its `out` is not used
};

// The kernels of one instruction set.
struct KernelTable {
  const char* instruction_set;
  void (*decode)(const Decode&);
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*merge)(const Merge&);
  void (*gemm)(const Gemm&);
  bool multiplies_weight = false;
};

// A table is null where the compiler did not know the instructions; see kernels.cpp.
extern const KernelTable* const kernels_portable;
extern const KernelTable* const kernels_avx2;
extern const KernelTable* const kernels_avx512;
extern const KernelTable* const kernels_avx512bf16;
extern const KernelTable* const kernels_amx;

// The tables that this processor and its system run, the best first, and words on what is left out.
struct Supported {
  const KernelTable* kernels[8];
  int count;
  const char* left_out;
};
const Supported& supported_kernels();

// Whether Intel made the processor: MKL's GEMMs use AVX-512 on no other.
bool intel_processor();

// Whether an x86 processor has instructions for products of bfloat16.
bool x86_bfloat16();

// Runs body(context, slot) for every slot in [0, slots), on PyTorch's intra-op threads.
void run_slots(int64_t slots, void (*body)(void*, int64_t), void* context);
int64_t thread_count();

}  // namespace rosa
