#include "cuda/kernel_calls.h"

#include <algorithm>

#include "cuda/checked_launches.h"

namespace rosa {
namespace {

constexpr bool CHECKED = true;  // The indices of a pattern were checked when it was made, or by the op's caller.
constexpr int64_t MOST_SPLITS = 16;
constexpr int64_t SDDMM_SPLIT_TOKENS = 512;  // the kernel's longest step twice

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_size(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

// As ON_TENSOR_CORES of device_functions.h.
bool on_tensor_cores(const Tensor& x, const Tensor& other) {
  return x.scalar_type() == ScalarType::BFloat16 ||
         (x.scalar_type() == ScalarType::Half && other.scalar_type() == ScalarType::Half);
}

// Rows that begin at multiples of 16 bytes: library GEMMs take slower kernels for others.
int64_t aligned_columns(int64_t columns) { return ceil_div(columns, 8) * 8; }

// Room for the sums of each split of a length, which a second kernel adds in order; none where nothing is split. There
// are at best two blocks for each multiprocessor.
OptionalTensor parts_of(const Tensor& like, int64_t length, int64_t step, int64_t tiles, int64_t multiprocessors,
                        std::vector<int64_t> sizes) {
  const int64_t wanted = ceil_div(2 * multiprocessors, std::max<int64_t>(1, tiles));
  const int64_t steps = std::max<int64_t>(1, ceil_div(length, step));
  const int64_t steps_a_split = ceil_div(steps, std::clamp<int64_t>(wanted, 1, std::min(MOST_SPLITS, steps)));
  const int64_t splits = ceil_div(steps, steps_a_split);
  if (splits == 1) return std::nullopt;
  sizes.insert(sizes.begin(), splits);
  return empty(like, sizes, ScalarType::Float);
}

Tensor gathered(const Tensor& x, int64_t count, int64_t repeats, const OptionalTensor& columns,
                const OptionalTensor& crow, int64_t row_length) {
  const Tensor source = unit_stride(x);
  const int64_t T = x.size(0), width = aligned_columns(count * repeats);
  const Tensor out = empty_matrix(x, T, width);
  for (int64_t i = 0; i < repeats; ++i)
    checked::gather_columns(view(out, {T, count}, {width, 1}, i * count), source, columns, crow, row_length, CHECKED);
  return first_columns(out, count * repeats);
}

// A dtype that the kernels read: float64 becomes float32.
Tensor kernel_numbers(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? converted(t, ScalarType::Float) : t;
}

}  // namespace

Tensor transposed_copy(const Tensor& x) {
  const Tensor source = unit_stride(x);
  const Tensor out = empty_matrix(x, x.size(1), ceil_div(x.size(0), TOKEN_PADDING) * TOKEN_PADDING);
  checked::transpose(out, source);
  return out;
}

Tensor gathered_columns(const Tensor& x, const Tensor& columns, int64_t count, int64_t repeats) {
  STD_TORCH_CHECK(count <= columns.numel(), "rosa_kernels_cuda: expected at least ", count, " indices of columns, got ",
                  columns.numel());
  return gathered(x, count, repeats, view(columns, {count}, {1}), std::nullopt, 0);
}

Tensor gathered_whole_rows(const Tensor& x, const Tensor& crow, int64_t count, int64_t row_length) {
  return gathered(x, count, 1, std::nullopt, crow, row_length);
}

Tensor packed_entries(const SparseMatrix& S) {
  const Tensor packed = empty(S.values, {S.nnz() + ENTRY_PADDING}, ScalarType::Long);
  checked::pack_entries(packed, S.col, S.permutation, kernel_numbers(S.values), CHECKED);
  return packed;
}

Tensor terms_below_each_other(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const Tensor out = empty_matrix(matrix, SPLIT_TERMS * rows, columns, ScalarType::BFloat16);
  checked::split_terms(out, matrix, columns, rows * columns);
  return out;
}

Tensor terms_beside_each_other(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), width = aligned_columns(SPLIT_TERMS * columns);
  const Tensor out = empty_matrix(matrix, rows, width, ScalarType::BFloat16);
  checked::split_terms(out, matrix, width, columns);
  return first_columns(out, SPLIT_TERMS * columns);
}

Tensor shrunk(const Tensor& x, const Tensor& A, const CallDropout& dropout, int64_t multiprocessors) {
  const Tensor source = unit_stride(x), by_rows = unit_stride(A);
  const int64_t T = x.size(0), R = padded_rank(A.size(0));
  const int64_t ranks = !on_tensor_cores(x, A)               ? SHRINK_RANKS_BY_LANES
                        : A.scalar_type() == x.scalar_type() ? SHRINK_RANKS
                                                             : SHRINK_RANKS_IN_TERMS;
  const int64_t tiles = ceil_div(T, SHRINK_TOKENS) * ceil_div(R, ranks);
  const Tensor H = empty_matrix(x, T, R, A.scalar_type());
  checked::shrink(H, source, by_rows, dropout.seed, dropout.threshold, dropout.keep_scale,
                  parts_of(x, x.size(1), SHRINK_STEP_BYTES / element_size(x), tiles, multiprocessors, {T, R}));
  return H;
}

void add_up_lora_grad(const Tensor& out, const Tensor& z, const Tensor& H, double scaling, const CallDropout& dropout,
                      int64_t multiprocessors) {
  const Tensor source = unit_stride(z);
  const int64_t T = z.size(0), features = z.size(1), R = H.size(1);
  const bool whole = H.scalar_type() == z.scalar_type() && on_tensor_cores(z, H);
  const int64_t tiles = ceil_div(features, LORA_GRAD_FEATURES) * ceil_div(R, whole ? LORA_GRAD_RANKS : RANK_STEP);
  checked::lora_grad(out, source, H, scaling, dropout.seed, dropout.threshold, dropout.keep_scale,
                     parts_of(z, T, LORA_GRAD_STEP_TOKENS, tiles, multiprocessors, {features, R}));
}

Tensor entries_of_product(const Tensor& dy, const Tensor& x, const Tensor& crow, const Tensor& col, ScalarType dtype,
                          int64_t multiprocessors) {
  const Tensor dy_transposed = transposed_copy(dy), x_transposed = transposed_copy(x);
  const int64_t nnz = col.numel();
  const Tensor out = empty(x, {nnz}, dtype == x.scalar_type() ? dtype : ScalarType::Float);
  checked::sddmm(
      out, dy_transposed, x_transposed, crow, col,
      parts_of(x, x_transposed.size(1), SDDMM_SPLIT_TOKENS, ceil_div(nnz, SDDMM_BLOCK_ENTRIES), multiprocessors, {nnz}),
      CHECKED);
  return converted(out, dtype);
}

Tensor gathered_entries(const Tensor& matrix, const Tensor& crow, const Tensor& col, ScalarType dtype) {
  const Tensor source = unit_stride(matrix);
  const Tensor out = empty(matrix, {col.numel()}, matrix.scalar_type());
  checked::gather_entries(out, source, crow, col, CHECKED);
  return converted(out, dtype);
}

Tensor dense(const OptionalTensor& weight, const SparseMatrix& S, ScalarType dtype) {
  const Tensor out = empty_matrix(S.values, S.rows, S.columns, dtype);
  checked::densify(out, weight ? OptionalTensor(unit_stride(*weight)) : std::nullopt, kernel_numbers(S.values), S.crow,
                   S.col, CHECKED);
  return out;
}

void add_sparse(Tensor& matrix, const SparseMatrix& S) {
  checked::densify(matrix, matrix, kernel_numbers(S.values), S.crow, S.col, CHECKED);
}

}  // namespace rosa
