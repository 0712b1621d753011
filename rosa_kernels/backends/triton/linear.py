"""y and dx by the way that the plan chose: library calls, then the linear kernel, then whole rows or blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_kernels.backends import hardware
from rosa_kernels.backends.problem import NO_DROPOUT, Linear, Sparse
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import configs, runtime
from rosa_kernels.backends.triton.arithmetic import int32_threshold
from rosa_kernels.backends.triton.columns import by_columns
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.linear_kernel import linear_kernel
from rosa_kernels.backends.triton.low_rank import block_r, shrink
from rosa_kernels.backends.triton.parts import for_readers
from rosa_kernels.backends.triton.scatter import dense
from rosa_kernels.plan import gpu, gpu_table

_GROUP_M = 8
_SMALL_TILE = 32


def linear(problem: Linear) -> Tensor:
    """(T, N) in x's dtype, contiguous. H, where known: parts (parts, T, r)."""
    device, H = problem.x.device, problem.H
    H_whole = H is not None and H.dtype == problem.x.dtype and H.shape[0] == 1
    call = problem.call()._replace(H_whole=H_whole)
    return take(problem, gpu.choose_linear(call, gpu_table.rates(device, hardware.target(device))))


def take(problem: Linear, way: gpu.LinearWay) -> Tensor:
    x, S = problem.x, problem.S
    if way.base == "merged":
        return F.linear(x, problem.merged(), problem.bias).contiguous()
    if way.base == "" and way.S == "delta":
        return F.linear(x, problem.delta()).contiguous()
    if way.base == "library":
        out = F.linear(x, problem.weight, problem.bias).contiguous()
    else:
        out = torch.empty(x.shape[0], problem.N, dtype=x.dtype, device=x.device)
    if way.S == "delta":
        out.addmm_(x, problem.delta().T)
    if way.H == "library":
        H = x @ problem.A.T if problem.H is None else problem.H[0]
        out.addmm_(H, problem.B.T, alpha=problem.scaling)
    if way.runs_the_kernel:
        _run_kernel(out, problem, way)
    elif way.base == "":
        out.zero_()
    if way.S == "rows":
        _add_rows(out, x, S)
    if way.S == "blocks":
        _launch(out, x, problem.N, S=S, sparse="shared", accumulate=True, block_n=16)
    return out


def _run_kernel(out: Tensor, problem: Linear, way: gpu.LinearWay) -> None:
    x, S = problem.x, problem.S
    in_loop = way.base == "kernel"
    H = A = B = None
    if way.H in ("inside", "before", "known"):
        B = problem.B
        A = problem.A if way.H == "inside" else None
        H = problem.H
        if way.H == "before":
            H = for_readers(shrink(x, problem.A, problem.dropout if problem.drop_at == "x" else NO_DROPOUT), problem.N)
    drop_at = problem.drop_at if B is not None and (A is not None or problem.drop_at == "out") else ""
    in_csr_form = way.S in ("gather", "gather_columns", "shared")
    _launch(
        out, x, problem.N, x_columns=by_columns(x) if way.S == "gather_columns" else None,
        weight=problem.weight if in_loop else None, bias=problem.bias if in_loop else None,
        H=H, A=A, B=B, scaling=problem.scaling, dropout=problem.dropout if drop_at else NO_DROPOUT, drop_at=drop_at,
        S=S if in_csr_form else None, sparse=way.S if in_csr_form else "",
        dense_S=_dense_operand(S, x.dtype) if way.S == "dense" else None,
        accumulate=way.base == "library",
    )  # fmt: skip


def _dense_operand(S: Sparse, dtype: torch.dtype) -> Tensor:
    """S dense in x's dtype, or in fp32 where its values are wider: the kernel then splits it."""
    return dense(S, dtype if S.values.dtype == dtype else torch.float32)


def _add_rows(out: Tensor, x: Tensor, S: Sparse) -> None:
    """out[:, rows] += x S_rowsᵀ: few outputs, so small tiles of tokens keep the GPU busy."""
    rows = S.whole_rows()
    count = rows.shape[0]
    _launch(out, x, count, weight=rows, accumulate=True, scatter_to=S, block_n=block_r(count), most_tokens=_SMALL_TILE)


def _launch(
    out: Tensor, x: Tensor, N: int, *, x_columns=None, weight=None, bias=None, H=None, A=None, B=None, scaling=1.0,
    dropout=NO_DROPOUT, drop_at="", S: Sparse | None = None, sparse="", dense_S=None, accumulate=False,
    scatter_to: Sparse | None = None,
    block_n: int | None = None, most_tokens: int = 2**31,
) -> None:  # fmt: skip
    (T, K), R = x.shape, 0 if B is None else B.shape[1]
    has_S = bool(sparse) or dense_S is not None
    config = _config(x, N, min(T, most_tokens), has_S, block_n)
    if sparse == "shared" and S.values.dtype != x.dtype:  # a pointer an element, each value split
        tile = {name: min(64, config[name]) for name in ("BLOCK_M", "BLOCK_N")}
        config = Config(tile | {"BLOCK_K": 32}, num_warps=4, num_stages=2)
    pattern = S or scatter_to
    crow = None if pattern is None else pattern.crow
    values, col, permutation = (None, None, None) if S is None else (S.values, S.col, S.permutation)
    bias = None if bias is None else bias.contiguous()
    runtime.launch(
        linear_kernel, (cdiv(T, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),),
        out, x, x_columns, weight, bias, H, A, B, dropout.seed, dense_S, values, crow, col, permutation,
        T, N, K, R, 0 if H is None else H.shape[0], out.shape[1], K, out.shape[1].bit_length(),
        scaling, dropout.keep_scale, int32_threshold(dropout.threshold),
        out.stride(0), *x.stride(), _strides(x_columns)[1],
        *_strides(weight), *_strides(A), *_strides(B), *_strides(dense_S),
        DROPOUT=drop_at, SPARSE=sparse, ACCUMULATE=accumulate, SCATTER=scatter_to is not None,
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
