"""The emulated kernels reach elements past 2**31, by strides of 2**30 and by true sizes of which the last block alone
runs. An offset that wraps reads zeros in place of the numbers, or writes them elsewhere.
"""

import os

import pytest
import torch

import cuda_kernels
import large_tensors
from large_tensors import copy_at_stride, zeros
from oracle import dense
from rosa_kernels.backends.gpu.sizes import MOST_LENGTH
from rosa_kernels.backends.triton.operands import NO_DROPOUT, Sparse
from rosa_kernels.pattern import CSRPattern

emulated = pytest.mark.skipif(
    "CUDA_EMULATED" not in os.environ, reason="runs where CUDA_EMULATED is set: test_emulation.py starts it"
)
FP32, BF16, INT32 = torch.float32, torch.bfloat16, torch.int32
FAR = 2**30
"""A stride that an int32 holds; from the second multiple on the offset is too large for it."""
T, K, N, R = 5, 24, 20, 4
BY_DTYPE = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


@pytest.fixture
def large(monkeypatch):
    """Large results take no memory, and the last block runs alone."""
    monkeypatch.setattr(torch, "empty", large_tensors.empty)
    monkeypatch.setenv("ROSA_EMULATION_BLOCKS", "last")


def numbers(*shape, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Small whole numbers, whose sums are exact."""
    return torch.randint(-3, 4, shape).to(dtype)


def far_rows(*shape, dtype: torch.dtype = BF16) -> torch.Tensor:
    return copy_at_stride(numbers(*shape, dtype=dtype), FAR, 1)


def check(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.equal(got.double(), exact.to(got.dtype).double())


def entries(dtype: torch.dtype) -> tuple[Sparse, torch.Tensor, CSRPattern]:
    """(S, S as a matrix, its pattern)."""
    pattern = CSRPattern.random((N, K), 0.3, seed=0)
    values = numbers(pattern.nnz, dtype=dtype)
    S = Sparse(values, pattern.crow_indices, pattern.col_indices, pattern.structure, (N, K))
    return S, dense(values, pattern), pattern


def add_to(y, *, H=None, B=None, S=None, x=None, x_transposed=None, in_features=K) -> None:
    packed = None if S is None else cuda_kernels.pack_entries(S)
    crow = None if S is None else S.crow
    cuda_kernels.epilogue(y, True, H, B, 1.0, NO_DROPOUT, crow, packed, x, x_transposed, None, in_features)


@emulated
@BY_DTYPE
class TestFarStrides:
    def test_shrink(self, dtype):
        x, A = far_rows(T, K, dtype=dtype), far_rows(R, K, dtype=dtype)
        check(cuda_kernels.shrink(x, A)[:, :R], x.double() @ A.double().T)

    def test_lora_grad(self, dtype):
        z, H, out = far_rows(T, K, dtype=dtype), numbers(T, 16, dtype=dtype), far_rows(K, R, dtype=dtype)
        cuda_kernels.lora_grad(z, H, out, 1.0)
        check(out, z.double().T @ H[:, :R].double())

    @pytest.mark.parametrize("gather", ["shared", "global"])
    def test_epilogue(self, dtype, gather):
        y, x, B = far_rows(T, N, dtype=dtype), far_rows(T, K, dtype=dtype), far_rows(N, R, dtype=dtype)
        (S, S_dense, _), H = entries(dtype), numbers(T, 16, dtype=dtype)
        exact = y.double() + H[:, :R].double() @ B.double().T + x.double() @ S_dense.T
        transposed = copy_at_stride(cuda_kernels.transpose(x), FAR, 1)
        add_to(y, H=H, B=B, S=S, **({"x": x} if gather == "shared" else {"x_transposed": transposed}))
        check(y, exact)

    def test_whole_rows(self, dtype):
        y, pattern = far_rows(T, N, dtype=dtype), CSRPattern.from_rows(torch.tensor([3, 11]), (N, K))
        product, exact = numbers(T, 2, dtype=FP32), y.double()
        exact[:, [3, 11]] += product
        cuda_kernels.epilogue(y, True, None, None, 1.0, NO_DROPOUT, pattern.crow_indices, None, None, None, product, K)
        check(y, exact)

    def test_sddmm(self, dtype):
        dy, x, (S, _, pattern) = numbers(T, N, dtype=dtype), numbers(T, K, dtype=dtype), entries(dtype)
        far = [copy_at_stride(cuda_kernels.transpose(matrix), FAR, 1) for matrix in (dy, x)]
        out = torch.empty(S.nnz)
        torch.ops.rosa_kernels_cuda.sddmm(out, *far, S.crow, S.col, None, indices_checked=True)
        check(out, (dy.double().T @ x.double())[pattern.row_of_entry(), S.col.long()])

    def test_copies(self, dtype):
        x, (S, S_dense, pattern) = far_rows(T, K, dtype=dtype), entries(dtype)
        check(cuda_kernels.transpose(x)[:, :T], x.T)
        columns = torch.tensor([3, 0, 23], dtype=INT32)
        check(cuda_kernels.gather_columns(x, columns)[:, :3], x[:, columns.long()])
        W, out = far_rows(N, K, dtype=dtype), far_rows(N, K, dtype=dtype)
        check(cuda_kernels.gather_entries(W, S.crow, S.col, dtype), W[pattern.row_of_entry(), S.col.long()])
        check(cuda_kernels.densify(out, W, S), W.double() + S_dense)


@emulated
@BY_DTYPE
@pytest.mark.usefixtures("large")
class TestLastBlocks:
    def test_transpose_and_gather_columns(self, dtype):
        x = zeros(2**23, 2**8 + 2**6, dtype=dtype)
        x[-64:, -64:] = numbers(64, 64, dtype=dtype)
        check(cuda_kernels.transpose(x)[-64:, -64:], x[-64:, -64:].T)
        columns = torch.arange(x.shape[1], dtype=INT32)
        check(cuda_kernels.gather_columns(x, columns)[-64:, -32:], x[-64:, -32:])

    def test_H(self, dtype):
        x, A = zeros(2**27 + 2**12, 8, dtype=dtype), numbers(16, 8, dtype=dtype)
        x[-16:] = numbers(16, 8, dtype=dtype)
        H = cuda_kernels.shrink(x, A)
        check(H[-16:], x[-16:].double() @ A.double().T)
        B, y = numbers(16, 16, dtype=dtype), zeros(x.shape[0], 16, dtype=dtype)
        add_to(y, H=H, B=B)
        check(y[-16:], H[-16:].double() @ B.double().T)

    def test_ranks_past_any_int32_in_dB(self, dtype):
        z, H = numbers(2100, 64, dtype=dtype), zeros(2100, 2**20 - 16, dtype=dtype)
        H[-5:, -16:] = numbers(5, 16, dtype=dtype)
        out = zeros(64, H.shape[1], dtype=dtype)
        cuda_kernels.lora_grad(z, H, out, 1.0)
        check(out[:, -16:], z[-5:].double().T @ H[-5:, -16:].double())

    def test_sums_of_parts(self, dtype):
        """The last block makes the second part, of the features behind a step; the first part is there."""
        step = cuda_kernels.SHRINK_STEP_BYTES // dtype.itemsize
        x, A = zeros(2**26 + 2**12, 2 * step, dtype=dtype), numbers(16, 2 * step, dtype=dtype)
        x[-16:, step:] = numbers(16, step, dtype=dtype)
        H, parts = zeros(x.shape[0], 16, dtype=dtype), zeros(2, x.shape[0], 16, dtype=FP32)
        parts[0, -16:] = numbers(16, 16)
        torch.ops.rosa_kernels_cuda.shrink(H, x, A, None, 0, 1.0, parts)
        check(H[-16:], parts[0, -16:].double() + x[-16:, step:].double() @ A[:, step:].double().T)

    def test_whole_rows(self, dtype):
        tokens, rows = 2**27 + 2**12, 16
        y, products = zeros(tokens, rows, dtype=dtype), zeros(tokens, rows, dtype=FP32)
        y[-16:], products[-16:] = numbers(16, rows, dtype=dtype), numbers(16, rows)
        exact, crow = y[-16:].double() + products[-16:], torch.arange(rows + 1, dtype=INT32) * K
        cuda_kernels.epilogue(y, True, None, None, 1.0, NO_DROPOUT, crow, None, None, None, products, K)
        check(y[-16:], exact)

    def test_the_most_features(self, dtype):
        y, H, B = zeros(1, MOST_LENGTH, dtype=dtype), numbers(1, 16, dtype=dtype), zeros(MOST_LENGTH, R, dtype=dtype)
        B[-32:], y[:, -32:] = numbers(32, R, dtype=dtype), numbers(1, 32, dtype=dtype)
        exact = y[:, -32:].double() + H[:, :R].double() @ B[-32:].double().T
        torch.ops.rosa_kernels_cuda.epilogue(
            y, True, None, H, B, 1.0, None, 0, 1.0, None, None, None, None, None, 1, K, multiprocessors=65535
        )
        check(y[:, -32:], exact)

    def test_the_most_entries(self, dtype):
        """Row 0 has all but the 40 entries of the last row."""
        rows, columns = 64, 8192
        S = Sparse(zeros(MOST_LENGTH, dtype=dtype), *crow_and_col(rows, columns), 0, (rows, columns))
        S.values[-40:] = numbers(40, dtype=dtype)
        x, y, dy = numbers(T, columns, dtype=dtype), numbers(T, rows, dtype=dtype), numbers(T, rows, dtype=dtype)

        packed = zeros(MOST_LENGTH + cuda_kernels.ENTRY_PADDING, dtype=torch.int64)
        torch.ops.rosa_kernels_cuda.pack_entries(packed, S.col, None, S.values, indices_checked=True)
        exact = y[:, -1].double() + x[:, -40:].double() @ S.values[-40:].double()
        cuda_kernels.epilogue(y, True, None, None, 1.0, NO_DROPOUT, S.crow, packed, None, transposed(x), None, columns)
        check(y[:, -1], exact)

        weight = numbers(rows, columns, dtype=dtype)
        merged = cuda_kernels.densify(weight.clone(), weight, S)
        check(merged[-1, -40:], weight[-1, -40:].double() + S.values[-40:])
        check(cuda_kernels.gather_entries(merged, S.crow, S.col, dtype)[-40:], merged[-1, -40:])

        out = zeros(MOST_LENGTH, dtype=dtype)
        operands = transposed(dy), transposed(x), S.crow, S.col, None
        torch.ops.rosa_kernels_cuda.sddmm(out, *operands, indices_checked=True)
        check(out[-40:], dy[:, -1].double() @ x[:, -40:].double())


def crow_and_col(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    crow, col = torch.full((rows + 1,), MOST_LENGTH - 40, dtype=INT32), zeros(MOST_LENGTH, dtype=INT32)
    crow[0], crow[-1], col[-40:] = 0, MOST_LENGTH, torch.arange(columns - 40, columns)
    return crow, col


def transposed(x: torch.Tensor) -> torch.Tensor:
    """As cuda_kernels.transpose, where only the last block would run."""
    return torch.nn.functional.pad(x.T, (0, -x.shape[0] % cuda_kernels.TOKEN_PADDING))
