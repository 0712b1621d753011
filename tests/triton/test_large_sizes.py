"""The interpreted kernels reach elements past 2**31, and what they cannot count is refused in words.

Offsets are made large in two ways: by strides of 2**30 under a few rows, and by true sizes of which the last program
alone runs. An offset that wraps reads zeros or ones in place of the numbers, or writes them elsewhere.
"""

import os

import pytest
import torch

import large_tensors
from large_tensors import copy_at_stride, zeros
from oracle import dense
from rosa_kernels.backends import triton as backend
from rosa_kernels.backends.gpu.sizes import MOST_LENGTH, MOST_RANK
from rosa_kernels.backends.kept_H import padded_rank
from rosa_kernels.backends.triton import launcher, linear, lora, split_k, transpose
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.densify import densify
from rosa_kernels.backends.triton.operands import Sparse
from rosa_kernels.backends.triton.sddmm import KERNELS, gather_entries
from rosa_kernels.pattern import CSRPattern

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs where TRITON_INTERPRET=1: test_interpreter.py starts it",
)
FP32, BF16, INT32 = torch.float32, torch.bfloat16, torch.int32
FAR = 2**30
"""A stride that an int32 holds; from the second multiple on the offset is too large for it."""
T, K, N, R = 5, 72, 20, 4


@pytest.fixture
def large(monkeypatch):
    """Large results take no memory, and the last program runs alone."""
    monkeypatch.setattr(torch, "empty", large_tensors.empty)
    with large_tensors.the_last_program_alone(monkeypatch):
        yield


def numbers(*shape, far: str = "") -> torch.Tensor:
    """Small whole numbers, whose sums are exact: with neighbours "rows" or "columns" FAR elements apart, or close."""
    tensor = torch.randint(-3, 4, shape).to(BF16)
    return copy_at_stride(tensor, *{"rows": (FAR, 1), "columns": (1, FAR)}[far]) if far else tensor


def entries(density: float = 0.3, shape: tuple[int, int] = (N, K)) -> tuple[Sparse, torch.Tensor]:
    """(S, S as a matrix)."""
    pattern = CSRPattern.random(shape, density, seed=0)
    values = numbers(pattern.nnz)
    S = Sparse(values, pattern.crow_indices, pattern.col_indices, pattern.structure, shape)
    return S, dense(values, pattern)


def check(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.equal(got.double(), exact.to(got.dtype).double())


FAR_APART = pytest.mark.parametrize("far", ["rows", "columns"])


@interpreted
class TestFarStrides:
    @FAR_APART
    @pytest.mark.parametrize("S_from", ["", "dense", "gather"])
    def test_linear(self, far, S_from):
        x, weight, A, B = numbers(T, K, far=far), numbers(N, K, far=far), numbers(R, K, far=far), numbers(N, R, far=far)
        y = numbers(T, N, far="rows")
        S, S_dense = entries()
        exact = y.double() + x.double() @ (weight.double() + B.double() @ A.double()).T
        if S_from:
            exact += x.double() @ S_dense.T
        of_S = {"": {}, "gather": {"S": S, "sparse": "gather"}}.get(S_from)
        if of_S is None:
            of_S = {"dense_S": copy_at_stride(S_dense.to(BF16), *((FAR, 1) if far == "rows" else (1, FAR)))}
        linear._launch(y, x, weight=weight, A=A, B=B, accumulate=True, **of_S)
        check(y, exact)

    @FAR_APART
    def test_blocks(self, far):
        pattern = CSRPattern.from_blocks(torch.tensor([[True, False, True], [False, True, True]]), 16, (32, 48))
        values, x, y = numbers(pattern.nnz), numbers(T, 48, far=far), numbers(T, 32, far="rows")
        S = Sparse(values, pattern.crow_indices, pattern.col_indices, pattern.structure, pattern.shape)
        exact = y.double() + x.double() @ dense(values, pattern).T
        linear._launch(y, x, S=S, sparse="blocks", accumulate=True, block_n=16)
        check(y, exact)

    @FAR_APART
    def test_shrink_and_lora_grad(self, far):
        K = 300  # more than a step for each of eight splits
        x, A, B = numbers(T, K, far=far), numbers(R, K, far=far), numbers(K, R, far=far)
        check(lora.shrink(x, A, FP32)[:, :R], x.double() @ A.double().T)
        H = numbers(T, padded_rank(R)).float()
        grad, dH = lora.lora_grad(x, H, numbers(K, R), 1.0, features_first=True, B=B)
        check(grad, x.double().T @ H[:, :R].double())
        check(dH[:, :R], x.double() @ B.double())

    @FAR_APART
    @pytest.mark.parametrize("algorithm", ["tiled", "entries", "entries_transposed"])
    def test_sddmm(self, far, algorithm):
        dy, x, (S, _) = numbers(T, N, far=far), numbers(T, K, far=far), entries()
        got = KERNELS[algorithm](dy, x, S.crow, S.col, FP32)
        check(got, sampled(dy.double().T @ x.double(), S))

    @FAR_APART
    def test_sddmm_of_blocks(self, far):
        pattern = CSRPattern.from_blocks(torch.tensor([[True, False], [False, True]]), 16, (32, 32))
        dy, x = numbers(T, 32, far=far), numbers(T, 32, far=far)
        S = Sparse(numbers(pattern.nnz), pattern.crow_indices, pattern.col_indices, pattern.structure, (32, 32))
        check(KERNELS["blocks"](dy, x, S.crow, S.col, FP32), sampled(dy.double().T @ x.double(), S))

    @FAR_APART
    def test_copies(self, far):
        x, (S, S_dense) = numbers(T, K, far=far), entries()
        check(transpose.transpose(x), x)
        columns = torch.tensor([3, 0, 71], dtype=INT32)
        check(transpose.gather_columns(x, columns)[:, :3], x[:, columns.long()])
        W = numbers(N, K, far=far)
        check(gather_entries(W, S.crow, S.col, BF16), sampled(W, S))
        check(densify(torch.empty(N, K, dtype=BF16), W, S), W.double() + S_dense)

    def test_whole_rows(self):
        y, product = numbers(T, N, far="rows"), copy_at_stride(numbers(T, 2).float(), FAR, 1)
        pattern = CSRPattern.from_rows(torch.tensor([3, 11]), (N, K))
        exact = y.double()
        exact[:, [3, 11]] += product
        transpose.add_at_rows(y, product, pattern.crow_indices, K)
        check(y, exact)


def sampled(matrix: torch.Tensor, S: Sparse) -> torch.Tensor:
    rows = torch.arange(S.shape[0]).repeat_interleave(S.crow.diff().long())
    return matrix[rows, S.col.long()]


@interpreted
@pytest.mark.usefixtures("large")
class TestLastPrograms:
    def test_transpose(self):
        x = zeros(2**23, 2**8 + 2**6, dtype=BF16)
        x[-64:, -64:] = numbers(64, 64)
        check(transpose.transpose(x)[-64:, -64:], x[-64:, -64:])

    def test_more_features_than_the_second_axis_of_a_grid_has_tiles(self):
        x = zeros(70, 65536 * 64, dtype=BF16)
        last = x[-6:, -64:]  # in the last tile of each copy
        last[:] = numbers(6, 64)
        check(transpose.transpose(x)[-6:, -64:], last)
        columns = zeros(65536 * 32, dtype=INT32)
        columns[-32:] = torch.arange(x.shape[1] - 32, x.shape[1])
        check(transpose.gather_columns(x, columns)[-6:, -32:], last[:, -32:])

    def test_more_rows_than_the_second_axis_of_a_grid_has_tiles(self):
        rows = 65536 * 32 + 5
        y, product, crow = zeros(T, rows, dtype=BF16), zeros(T, rows, dtype=FP32), torch.arange(rows + 1, dtype=INT32)
        y[:, -5:], product[:, -5:] = numbers(T, 5), numbers(T, 5)
        exact = y[:, -5:].double() + product[:, -5:]
        transpose.add_at_rows(y, product, crow, 1)
        check(y[:, -5:], exact)

    def test_longer_rows_of_blocks_than_the_second_axis_of_a_grid_has_tiles(self):
        length = 65536 * 32 + 32
        dy, x, col = numbers(T, 16), zeros(T, length, dtype=BF16), zeros(16 * length, dtype=INT32)
        x[:, -32:], col[length - 32 : length] = numbers(T, 32), torch.arange(length - 32, length)
        crow = torch.arange(17, dtype=INT32) * length
        got = KERNELS["blocks"](dy, x, crow, col, FP32)
        check(got.view(16, length)[:, -32:], dy.double().T @ x[:, -32:].double())

    def test_gather_columns(self):
        x, columns = zeros(2**24 + 2**12, 130, dtype=BF16), torch.arange(128, dtype=INT32) + 2
        x[-32:, -32:] = numbers(32, 32)
        check(transpose.gather_columns(x, columns)[-32:, -32:], x[-32:, -32:])

    def test_linear_with_the_most_tokens(self):
        x, weight, y = zeros(MOST_LENGTH, 1, dtype=BF16), numbers(16, 1), zeros(MOST_LENGTH, 16, dtype=BF16)
        x[-16:] = numbers(16, 1)
        linear._launch(y, x, weight=weight)
        check(y[-16:], x[-16:].double() @ weight.double().T)

    def test_linear_with_the_most_features(self):
        x, A = zeros(1, 40, dtype=BF16), numbers(R, 40)
        x += 1
        B, y = zeros(MOST_LENGTH, R, dtype=BF16), zeros(1, MOST_LENGTH, dtype=BF16)
        B[-16:] = numbers(16, R)
        linear._launch(y, x, A=A, B=B)
        check(y[:, -16:], x.double() @ A.double().T @ B[-16:].double().T)

    def test_H(self):
        x, A = zeros(2**27 + 2**12, 8, dtype=BF16), numbers(16, 8)
        x[-16:] = numbers(16, 8)
        H = lora.shrink(x, A, FP32)
        check(H[-16:], x[-16:].double() @ A.double().T)
        H = zeros(*H.shape, dtype=FP32)
        H[-16:] = numbers(16, 16)
        B, y = numbers(16, 16), zeros(x.shape[0], 16, dtype=BF16)
        linear._launch(y, x, H=H, B=B)
        check(y[-16:], H[-16:].double() @ B.double().T)

    def test_parts_of_dH(self, monkeypatch):
        z, H, B = zeros(64, 2**26 + 2**12, dtype=BF16), numbers(64, 16).float(), zeros(2**26 + 2**12, 16, dtype=BF16)
        z[:, -32:], B[-32:] = numbers(64, 32), numbers(32, 16)
        like, added = zeros(*B.shape, dtype=BF16), []
        monkeypatch.setattr(lora, "add_parts", lambda out, parts: added.append(parts))  # half a million parts of dH
        grad, _ = lora.lora_grad(z, H, like, 1.0, features_first=True, B=B)
        check(grad[-32:], z[:, -32:].double().T @ H.double())
        check(added[1][-1], z[:, -32:].double() @ B[-32:].double())

    def test_sums_of_parts(self):
        parts = zeros(2, 2**31 + 2**12, dtype=FP32)
        parts[:, -1024:] = numbers(2, 1024)
        out = large_tensors.empty(parts.shape[1], dtype=BF16)
        split_k.add_parts(out, parts)
        check(out[-1024:], parts[:, -1024:].sum(0))

    @pytest.mark.parametrize("algorithm", ["tiled", "entries"])
    def test_sddmm_with_the_most_entries(self, algorithm):
        """Row 0 has all but the 40 entries of the last row."""
        dy, x = numbers(T, 64), zeros(T, MOST_LENGTH, dtype=BF16)
        x[:, -32:] = numbers(T, 32)
        crow, col = crow_of(64, 40), zeros(MOST_LENGTH, dtype=INT32)
        col[-32:] = torch.arange(MOST_LENGTH - 32, MOST_LENGTH)
        got = KERNELS[algorithm](dy, x, crow, col, FP32)
        check(got[-32:], dy[:, -1].double() @ x[:, -32:].double())

    def test_entries_written_and_read_at_the_end_of_a_matrix(self):
        rows, columns = 2**16 + 16, 2**15
        crow, col, values = zeros(rows + 1, dtype=INT32), torch.arange(columns - 40, columns).int(), numbers(40)
        crow[-1] = 40
        S = Sparse(values, crow, col, 0, (rows, columns))
        weight = zeros(rows, columns, dtype=BF16)
        weight[-1, -40:] = numbers(40)
        out = densify(zeros(rows, columns, dtype=BF16), weight, S)
        check(out[-1, -40:], weight[-1, -40:].double() + values)
        check(gather_entries(out, crow, col, BF16), out[-1, -40:])

    def test_gather_beside_a_long_row(self, monkeypatch):
        """The positions in a long row are added to the first entry of the next one too, where the sum passes 2**31."""
        monkeypatch.setattr(linear, "_config", lambda *sizes: Config({"BLOCK_M": 1, "BLOCK_N": 2, "BLOCK_K": 16}, 4, 1))
        monkeypatch.setattr(linear, "_block_e", lambda *sizes: 2**18)
        nnz, long = MOST_LENGTH, 2**20 + 2**19
        crow = zeros(5, dtype=INT32)
        crow[2:] = torch.tensor([nnz - 40 - long, nnz - 40, nnz])
        col, values = zeros(nnz, dtype=INT32), zeros(nnz, dtype=BF16)
        col[-40:], values[-40:] = torch.arange(1, 41), numbers(40)
        large_tensors.below(values, 2**20).fill_(1)  # at column 0
        x, y = numbers(1, 41), zeros(1, 4, dtype=BF16)
        x[0, 0] = 1
        linear._launch(y, x, S=Sparse(values, crow, col, 0, (4, 41)), sparse="gather")
        check(y[0, -1], x[0, 1:].double() @ values[-40:].double())


def crow_of(rows: int, of_the_last: int) -> torch.Tensor:
    """Row 0 has all but the entries of the last row, MOST_LENGTH together."""
    crow = torch.full((rows + 1,), MOST_LENGTH - of_the_last, dtype=INT32)
    crow[0], crow[-1] = 0, MOST_LENGTH
    return crow


def on_meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return large_tensors.allocate(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "T,in_features,out_features,r,message",
    [
        (MOST_LENGTH + 1, 8, 8, 4, f"x: on a GPU expected at most {MOST_LENGTH} tokens, got {MOST_LENGTH + 1}"),
        (8, MOST_LENGTH + 1, 8, 4, f"x: on a GPU expected at most {MOST_LENGTH} in_features"),
        (8, 8, MOST_LENGTH + 1, 4, f"y: on a GPU expected at most {MOST_LENGTH} out_features"),
        (8, 8, 8, MOST_RANK + 1, f"lora_A: on a GPU expected at most {MOST_RANK} ranks"),
    ],
)
def test_what_the_kernels_cannot_count_is_refused(T, in_features, out_features, r, message):
    x, dy, weight = on_meta(T, in_features), on_meta(T, out_features), on_meta(out_features, in_features)
    adapters = on_meta(r, in_features), on_meta(out_features, r), 1.0
    with pytest.raises(ValueError, match=message):
        backend.rosa_linear(x, weight, None, *adapters, None, None, None, 0, 0.0, None)
    with pytest.raises(ValueError, match=message):
        needs = [True, False, False, True, True, False]
        backend.rosa_linear_backward(dy, x, weight, *adapters, None, None, None, None, None, None, 0, 0.0, None, needs)
    if r == MOST_RANK + 1:
        return
    crow, col, values = on_meta(out_features + 1, dtype=INT32), on_meta(9, dtype=INT32), on_meta(9)
    with pytest.raises(ValueError, match=message):
        backend.spmm(x, values, crow, col, 0)
    with pytest.raises(ValueError, match=message):
        backend.sddmm(dy, x, crow, col, 0)
    if T == 8:
        with pytest.raises(ValueError, match=message):
            backend.csr_add(weight, values, crow, col)


def test_a_grid_that_no_gpu_has_is_refused():
    x = torch.zeros(4, 4)
    for grid in ((2**31,), (1, 65536), (1, 1, 65536)):
        with pytest.raises(ValueError, match=f"sum_kernel: expected a grid of at most .* got .*{max(grid)}"):
            launcher.launch(split_k.sum_kernel, grid, (x, x), (16, 1), (), split_k._CONFIG)
