"""The torch.autograd.Functions: which tensors an op saves for its backward, and which gradients it returns.

Only inputs are saved. So activation checkpointing, FSDP and autograd's checks for in-place changes see all that is, and
nothing that was computed from a trainable tensor outlives a call.
"""

from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rosa_kernels import ops
from rosa_kernels.pattern import transposed_structure


class RoSALinearFunction(Function):
    """y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ; W, b, A with B, and S may each be None."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        lora_A,
        lora_B,
        scaling,
        values,
        crow,
        col,
        ccol,
        row,
        permutation,
        structure,
        dropout_p,
        seed,
    ):
        ctx.numbers = scaling, structure, dropout_p
        need_x, need_weight, need_bias, need_A, need_B, _, need_values = ctx.needs_input_grad[:7]
        ctx.needs = [need_x, need_weight, need_bias, need_A, need_B, need_values]
        ctx.save_for_backward(
            x, weight if need_x else None, lora_A, lora_B, values, crow, col, ccol, row, permutation, seed
        )
        return ops.rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, values, crow, col, ccol, row, permutation, seed = ctx.saved_tensors
        scaling, structure, dropout_p = ctx.numbers
        gradients = ops.rosa_linear_backward(
            dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation,
            structure, dropout_p, seed, ctx.needs,
        )  # fmt: skip
        dx, dweight, dbias, dA, dB, dvalues = (
            gradient if need else None for gradient, need in zip(gradients, ctx.needs)
        )
        return dx, dweight, dbias, dA, dB, None, dvalues, None, None, None, None, None, None, None, None


class SpMMFunction(Function):
    """y = x Sᵀ; dx = dy S; dvalues = sddmm(dy, x)."""

    @staticmethod
    def forward(ctx, x, values, crow, col, ccol, row, permutation, structure):
        ctx.structure = structure
        ctx.save_for_backward(x, values, crow, col, ccol, row, permutation)
        return ops.spmm(x, values, crow, col, structure)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, values, crow, col, ccol, row, permutation = ctx.saved_tensors
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = ops.spmm(dy, values[permutation], ccol, row, transposed_structure(ctx.structure))
        if ctx.needs_input_grad[1]:
            dvalues = ops.sddmm(dy, x, crow, col, ctx.structure).to(values.dtype)
        return dx, dvalues, None, None, None, None, None, None


class SDDMMFunction(Function):
    """v_e = Σ_t dy[t, row_e] x[t, col_e]; with gradient g as the values of S: ddy = x Sᵀ, dx = dy S."""

    @staticmethod
    def forward(ctx, dy, x, crow, col, ccol, row, permutation, structure):
        ctx.structure = structure
        ctx.save_for_backward(dy, x, crow, col, ccol, row, permutation)
        return ops.sddmm(dy, x, crow, col, structure)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dy, x, crow, col, ccol, row, permutation = ctx.saved_tensors
        ddy = dx = None
        if ctx.needs_input_grad[0]:
            ddy = ops.spmm(x, g, crow, col, ctx.structure)
        if ctx.needs_input_grad[1]:
            dx = ops.spmm(dy, g[permutation], ccol, row, transposed_structure(ctx.structure))
        return ddy, dx, None, None, None, None, None, None


class CSRAddFunction(Function):
    """W + S; dW = g, dvalues_e = g[row_e, col_e]."""

    @staticmethod
    def forward(ctx, weight, values, crow, col, rows):
        ctx.values_dtype = values.dtype
        ctx.save_for_backward(rows, col)
        return ops.csr_add(weight, values, crow, col)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        rows, col = ctx.saved_tensors
        dvalues = g[rows, col.long()].to(ctx.values_dtype) if ctx.needs_input_grad[1] else None
        return g if ctx.needs_input_grad[0] else None, dvalues, None, None, None
