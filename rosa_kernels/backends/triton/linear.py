"""y and dx by the way that the plan chose: library calls, then the linear kernel, then whole rows or blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_kernels.backends.gpu import cost_model, device_rates, hardware
from rosa_kernels.backends.gpu.operands import NO_DROPOUT, Linear, Sparse
from rosa_kernels.backends.gpu.split_bf16_gemm import add_few_columns_product, few_rows_product, plus_product
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import configs, launcher
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.densify import dense
from rosa_kernels.backends.triton.device_functions import int32_threshold
from rosa_kernels.backends.triton.linear_kernel import linear_kernel
from rosa_kernels.backends.triton.lora import block_r, shrink
from rosa_kernels.backends.triton.split_k import for_readers
from rosa_kernels.backends.triton.transpose import add_at_rows, by_columns, gather_columns

_GROUP_M = 8
_SMALL_TILE = 32


def linear(problem: Linear) -> Tensor:
    """(T, N) in x's dtype, contiguous. H, where known: parts (parts, T, r)."""
    device = problem.x.device
    return take(problem, cost_model.choose_linear(problem.call(), device_rates.rates(device, hardware.target(device))))


def take(problem: Linear, way: cost_model.LinearWay) -> Tensor:
    x, S = problem.x, problem.S
    if way.base == "merged":
        return F.linear(x, problem.merged(), problem.bias).contiguous()
    out = F.linear(x, problem.weight, problem.bias).contiguous() if way.base == "library" else None
    if way.S == "delta":
        out = plus_product(out, x, problem.delta().T)
    if way.S == "columns":
        columns = problem.operand(S.whole_columns())
        out = add_few_columns_product(out, gather_columns(x, S.col[: columns.shape[1]]), columns)
    if way.H == "library":
        H = x @ problem.A.T if problem.H is None else problem.H[0]
        out = plus_product(out, H, problem.B.T, problem.scaling)
    if way.runs_the_kernel:
        out = _run_kernel(out, problem, way)
    if out is None:
        out = torch.zeros(x.shape[0], problem.N, dtype=x.dtype, device=x.device)
    if way.S == "rows":
        add_at_rows(out, few_rows_product(x, problem.operand(S.whole_rows())), S.crow, S.shape[1])
    if way.S == "blocks":
        _launch(out, x, problem.N, S=S, sparse="blocks", accumulate=True, block_n=16)
    return out


def _run_kernel(out: Tensor | None, problem: Linear, way: cost_model.LinearWay) -> Tensor:
    x, S, accumulate = problem.x, problem.S, out is not None
    if out is None:
        out = torch.empty(x.shape[0], problem.N, dtype=x.dtype, device=x.device)
    in_loop = way.base == "kernel"
    H = A = B = None
    if way.H in ("inside", "before", "known"):
        B = problem.B
        A = problem.A if way.H == "inside" else None
        H = problem.H
        if way.H == "before":
            H = for_readers(shrink(x, problem.A, problem.dropout if problem.drop_at == "x" else NO_DROPOUT), problem.N)
    drop_at = problem.drop_at if B is not None and (A is not None or problem.drop_at == "out") else ""
    in_csr_form = way.S in ("gather", "gather_columns")
    _launch(
        out, x, problem.N, x_columns=by_columns(x) if way.S == "gather_columns" else None,
        weight=problem.weight if in_loop else None, bias=problem.bias if in_loop else None,
        H=H, A=A, B=B, scaling=problem.scaling, dropout=problem.dropout if drop_at else NO_DROPOUT, drop_at=drop_at,
        S=S if in_csr_form else None, sparse=way.S if in_csr_form else "",
        dense_S=_dense_operand(S, x.dtype) if way.S == "dense" else None,
        accumulate=accumulate,
    )  # fmt: skip
    return out


def _dense_operand(S: Sparse, dtype: torch.dtype) -> Tensor:
    """S dense in x's dtype, or in fp32 where its values are wider: the kernel then splits it."""
    return dense(S, dtype if S.values.dtype == dtype else torch.float32)


def _launch(
    out: Tensor, x: Tensor, N: int, *, x_columns=None, weight=None, bias=None, H=None, A=None, B=None, scaling=1.0,
    dropout=NO_DROPOUT, drop_at="", S: Sparse | None = None, sparse="", dense_S=None, accumulate=False,
    block_n: int | None = None,
) -> None:  # fmt: skip
    (T, K), R = x.shape, 0 if B is None else B.shape[1]
    has_S = bool(sparse) or dense_S is not None
    config = _config(x, N, T, has_S, block_n)
    if sparse == "blocks" and S.values.dtype != x.dtype:  # a pointer an element, each value split
        tile = {name: min(64, config[name]) for name in ("BLOCK_M", "BLOCK_N")}
        config = Config(tile | {"BLOCK_K": 32}, num_warps=4, num_stages=2)
    in_csr_form = (None,) * 4 if S is None else (S.values, S.crow, S.col, S.permutation)
    bias = None if bias is None else bias.contiguous()
    launcher.launch(
        linear_kernel, (cdiv(T, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),),
        out, x, x_columns, weight, bias, H, A, B, dropout.seed, dense_S, *in_csr_form,
        T, N, K, R, 0 if H is None else H.shape[0],
        scaling, dropout.keep_scale, int32_threshold(dropout.threshold),
        out.stride(0), *x.stride(), _strides(x_columns)[1],
        *_strides(weight), *_strides(A), *_strides(B), *_strides(dense_S),
        DROPOUT=drop_at, SPARSE=sparse, ACCUMULATE=accumulate,
        EVEN_K=K % config["BLOCK_K"] == 0, PRECISION=hardware.precision(x),
        BLOCK_R=_block_r(R, H, B, x.dtype), BLOCK_E=_block_e(config, x.element_size()), GROUP_M=_GROUP_M, config=config,
    )  # fmt: skip


def _strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else matrix.stride()


def _config(x: Tensor, N: int, tokens: int, has_S: bool, block_n: int | None) -> Config:
    """The tokens' configuration; a smaller tile where registers or shared memory would not hold what else is needed."""
    if N % 8 or x.shape[1] % 8:  # no wide loads: a pointer an element
        tokens = min(tokens, _SMALL_TILE)
    config = configs.choose(configs.LINEAR, x.device, x.dtype, tokens)
    if block_n is None and has_S:
        block_n = min(config["BLOCK_N"], 128)
    if block_n is None or block_n == config["BLOCK_N"]:
        return config
    return config.with_blocks(BLOCK_N=block_n)


def _block_r(R: int, H: Tensor | None, B: Tensor | None, dtype: torch.dtype) -> int:
    """Ranks at a time; fewer where B is split into numbers of x's dtype. H made in the kernel takes all at once."""
    return block_r(R) if H is None or B.dtype == dtype else min(32, block_r(R))


def _block_e(config: Config, element_size: int) -> int:
    """Entries of a row that a gather takes at a time: as many as leave each thread 64 bytes of products in flight."""
    elements = 64 // element_size
    return max(1, elements * 32 * config.num_warps // (config["BLOCK_M"] * config["BLOCK_N"]))
