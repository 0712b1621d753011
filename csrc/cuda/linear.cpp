#include "cuda/linear.h"

#include "cuda/checked_launches.h"
#include "cuda/kernel_calls.h"

namespace rosa {
namespace {

// weight + scaling · B A + S of a layer in fp32.
Tensor merged_weight(const Layer& layer) {
  if (!layer.A) return dense(layer.weight, *layer.S, ScalarType::Float);
  Tensor merged = empty_matrix(*layer.weight, layer.weight->size(0), layer.weight->size(1));
  gemm(merged, *layer.weight, *layer.B, *layer.A, 1, layer.scaling);
  if (layer.S) add_sparse(merged, *layer.S);
  return merged;
}

// scaling · B A + S of a layer, rounded once to a dtype: by the GEMM that adds to S, where all have that dtype.
Tensor dense_delta(const Layer& layer, ScalarType dtype) {
  const SparseMatrix& S = *layer.S;
  if (!layer.A) return dense(std::nullopt, S, dtype);
  if (layer.A->scalar_type() == dtype && S.values.scalar_type() == dtype) {
    Tensor delta = dense(std::nullopt, S, dtype);
    gemm(delta, delta, *layer.B, *layer.A, 1, layer.scaling);
    return delta;
  }
  Tensor delta = empty_matrix(S.values, S.rows, S.columns, ScalarType::Float);
  gemm(delta, delta, converted(*layer.B, ScalarType::Float), converted(*layer.A, ScalarType::Float), 0, layer.scaling);
  add_sparse(delta, S);
  return converted(delta, dtype);
}

// What y holds while the parts of a call are added to it.
class Sum {
 public:
  Sum(const LinearProblem& problem)
      : problem_(problem), y_(empty_matrix(problem.x, problem.x.size(0), problem.out_features)) {}

  // y += alpha · a b
  void add_product(const Tensor& a, const Tensor& b, double alpha = 1) {
    rosa::add_product(y_, started_, problem_.layer.bias, a, b, alpha);
    started_ = true;
  }

  // y += alpha · a b, of operands in fp32 beside a y of 16 bits.
  void add_fp32_product(const Tensor& a, const Tensor& b) {
    Tensor wide =
        started_ ? converted(y_, ScalarType::Float) : empty_matrix(y_, y_.size(0), y_.size(1), ScalarType::Float);
    const OptionalTensor& bias = problem_.layer.bias;
    rosa::add_product(wide, started_, bias ? OptionalTensor(converted(*bias, ScalarType::Float)) : std::nullopt, a, b,
                      1);
    y_ = converted(wide, y_.scalar_type());
    started_ = true;
  }

  // The low-rank part, x Sᵀ of an S in shared or global memory, and whole rows: each where the algorithm gives it to
  // the epilogue.
  void run_epilogue(const LinearAlgorithm& algorithm);

  Tensor finish() {
    if (!started_) torch::stable::zero_(y_);
    return y_;
  }

 private:
  const LinearProblem& problem_;
  Tensor y_;
  bool started_ = false;
};

// Whether wider values of S are rounded to x's dtype: beside a low-rank part, as H is rounded. An S alone is taken as
// terms that lose nothing.
bool rounds_values(const LinearProblem& p) {
  return p.layer.B.has_value() && p.x.scalar_type() == ScalarType::BFloat16;
}

// x Sᵀ of whole rows (T, terms · count) in fp32, and the number of terms.
std::pair<Tensor, int64_t> row_products(const LinearProblem& p) {
  const Tensor rows = p.layer.S->whole_rows();
  const ScalarType dtype = p.x.scalar_type();
  if (rows.scalar_type() == dtype || rounds_values(p))
    return {fp32_product(p.x, transposed(converted(rows, dtype))), 1};
  const Tensor wide = converted(rows, ScalarType::Float);
  if (dtype == ScalarType::BFloat16) return {fp32_product(p.x, transposed(terms_below_each_other(wide))), SPLIT_TERMS};
  return {fp32_product(converted(p.x, ScalarType::Float), transposed(wide)), 1};
}

void Sum::run_epilogue(const LinearAlgorithm& algorithm) {
  const LinearProblem& p = problem_;
  const bool low_rank = algorithm.low_rank == LowRank::kernel;
  OptionalTensor bias, crow, entries, x, x_transposed, products;
  int64_t terms = 1;
  if (!started_ && p.layer.bias) bias = contiguous(*p.layer.bias, p.x.scalar_type());
  if (algorithm.sparse == Sparse::shared || algorithm.sparse == Sparse::global) {
    entries = packed_entries(*p.layer.S);
    if (algorithm.sparse == Sparse::shared)
      x = unit_stride(p.x);
    else
      x_transposed = transposed_copy(p.x);
  } else if (algorithm.sparse == Sparse::rows) {
    std::tie(products, terms) = row_products(p);
  }
  if (entries || products) crow = p.layer.S->crow;
  checked::epilogue(y_, started_, bias, low_rank ? p.H : std::nullopt, low_rank ? p.layer.B : std::nullopt,
                    p.layer.scaling, p.drop_out.seed, p.drop_out.threshold, p.drop_out.keep_scale, crow, entries, x,
                    x_transposed, products, terms, p.x.size(1), p.multiprocessors, true);
  started_ = true;
}

// y += x Sᵀ of whole columns.
void add_columns(Sum& y, const LinearProblem& p) {
  const SparseMatrix& S = *p.layer.S;
  const Tensor columns = S.whole_columns();
  const int64_t count = columns.size(1);
  const ScalarType dtype = p.x.scalar_type();
  const bool whole = columns.scalar_type() == dtype || rounds_values(p);
  const int64_t terms = !whole && dtype == ScalarType::BFloat16 ? SPLIT_TERMS : 1;
  const Tensor gathered = gathered_columns(p.x, S.col, count, terms);
  if (whole) return y.add_product(gathered, transposed(converted(columns, dtype)));
  const Tensor wide = converted(columns, ScalarType::Float);
  if (terms > 1) return y.add_product(gathered, transposed(terms_beside_each_other(wide)));
  if (dtype == ScalarType::Float) return y.add_product(gathered, transposed(wide));
  y.add_fp32_product(converted(gathered, ScalarType::Float), transposed(wide));
}

bool is_matrix(const OptionalTensor& t, int64_t rows, int64_t columns) {
  return t && t->dim() == 2 && t->size(0) == rows && t->size(1) == columns;
}

// Whatever an algorithm reads of a problem must be there, and fit.
void expect_fits(const LinearProblem& p, const LinearAlgorithm& algorithm) {
  const int64_t K = p.x.size(1), N = p.out_features;
  const Layer& layer = p.layer;
  const auto expect = [](bool fits, const char* what) { STD_TORCH_CHECK(fits, "rosa_kernels_cuda: ", what); };
  expect(!layer.weight || is_matrix(layer.weight, N, K), "weight: expected (out_features, in_features)");
  expect(!layer.bias || (layer.bias->dim() == 1 && layer.bias->numel() == N), "bias: expected (out_features,)");
  expect(layer.A.has_value() == layer.B.has_value(), "lora_A and lora_B: expected both or neither");
  if (layer.A) {
    const int64_t r = layer.A->dim() == 2 ? layer.A->size(0) : 0;
    expect(r > 0 && is_matrix(layer.A, r, K) && is_matrix(layer.B, N, r),
           "lora_A and lora_B: expected (r, in_features) and (out_features, r)");
  }
  expect(!layer.S || (layer.S->rows == N && layer.S->columns == K), "crow: expected out_features + 1 indices");
  expect(algorithm.base == Base::none || layer.weight, "base: expected no base, as weight is None");
  expect(algorithm.base != Base::merged || ((layer.A || layer.S) && p.x.scalar_type() == ScalarType::Float),
         "base: expected something to merge, in float32");
  expect(algorithm.low_rank == LowRank::none || layer.A, "low_rank: expected none, as lora_A is None");
  expect(algorithm.sparse == Sparse::none || layer.S, "sparse: expected none, as S has no entries");
  expect(algorithm.low_rank != LowRank::delta || algorithm.sparse == Sparse::delta,
         "low_rank: expected sparse beside it");
  expect(algorithm.sparse != Sparse::rows || layer.S->structure == Structure::row, "sparse: expected whole rows");
  expect(algorithm.sparse != Sparse::columns || layer.S->structure == Structure::column,
         "sparse: expected whole columns");
}

template <typename Enum>
Enum checked_number(const char* name, int64_t number, Enum last) {
  STD_TORCH_CHECK(0 <= number && number <= static_cast<int64_t>(last), "rosa_kernels_cuda: ", name, ": expected 0 to ",
                  static_cast<int64_t>(last), ", got ", number);
  return static_cast<Enum>(number);
}

}  // namespace

LinearAlgorithm LinearAlgorithm::of(int64_t base, int64_t low_rank, int64_t sparse) {
  return {checked_number("base", base, Base::merged), checked_number("low_rank", low_rank, LowRank::delta),
          checked_number("sparse", sparse, Sparse::columns)};
}

Tensor make_H(const Tensor& x, const Tensor& A, const CallDropout& dropout, int64_t multiprocessors) {
  if (dropout.seed || A.scalar_type() != x.scalar_type()) return shrunk(x, A, dropout, multiprocessors);
  return library_H(x, A);
}

Tensor linear(LinearProblem& p, const LinearAlgorithm& algorithm) {
  expect_fits(p, algorithm);
  const Layer& layer = p.untransposed ? *p.untransposed : p.layer;
  const auto of_product = [&](const Tensor& matrix) { return p.untransposed ? matrix : transposed(matrix); };
  Sum y(p);
  if (algorithm.base == Base::merged) {
    y.add_product(p.x, of_product(merged_weight(layer)));
    return y.finish();
  }
  if (algorithm.uses_H() && !p.H)
    p.H = algorithm.low_rank == LowRank::kernel ? shrunk(p.x, *p.layer.A, p.drop_x, p.multiprocessors)
                                                : make_H(p.x, *p.layer.A, p.drop_x, p.multiprocessors);
  // Whole rows alone touch few columns of y, and are added behind the base.
  const bool rows_alone = algorithm.sparse == Sparse::rows && algorithm.low_rank == LowRank::none;
  const bool in_epilogue =
      algorithm.low_rank == LowRank::kernel || algorithm.sparse == Sparse::shared || algorithm.sparse == Sparse::global;
  if (in_epilogue) y.run_epilogue(algorithm);
  if (algorithm.sparse == Sparse::delta) y.add_product(p.x, of_product(dense_delta(layer, p.x.scalar_type())));
  if (algorithm.sparse == Sparse::columns) add_columns(y, p);
  if (algorithm.low_rank == LowRank::library)
    y.add_product(first_columns(*p.H, p.layer.B->size(1)), transposed(*p.layer.B), p.layer.scaling);
  if (algorithm.base == Base::library) y.add_product(p.x, transposed(*p.layer.weight));
  if (rows_alone) y.run_epilogue(algorithm);
  return y.finish();
}

}  // namespace rosa
