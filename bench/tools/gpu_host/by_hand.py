"""The fastest hand-written PyTorch for each case, counted in calls of the host.

These are the forms of hand_written.py for a GPU, without a layer of Python around the ops: H is saved, and scaling is a
factor of GEMMs, so that it takes no call of its own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd import Function

from gpu_host.cases import Case, TinyLayer
from layers import SCALING


class LoRA(Function):
    """All of one dtype."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, scaling):
        y = F.linear(x, W, b)
        H = F.linear(x, A)
        ctx.save_for_backward(x, W, A, B, H)
        ctx.scaling = scaling
        return y.addmm_(H, B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, H = ctx.saved_tensors
        scaling = ctx.scaling
        dH = dy @ B
        dA = torch.addmm(A, dH.t(), x, beta=0, alpha=scaling)
        dB = torch.addmm(B, dy.t(), H, beta=0, alpha=scaling)
        return torch.mm(dy, W).addmm_(dH, A, alpha=scaling), None, None, dA, dB, None


class WiderLoRA(Function):
    """fp32 adapters beside 16-bit x, as the modules have them; with dropout where p > 0."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, scaling, p):
        ctx.wider, ctx.scaling, ctx.p = A.dtype, scaling, p
        A, B = A.to(x.dtype), B.to(x.dtype)
        y = F.linear(x, W, b)
        dropped, kept = torch.native_dropout(x, p, True) if p else (x, None)
        H = F.linear(dropped, A)
        ctx.save_for_backward(dropped, W, A, B, H, kept)
        return y.addmm_(H, B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, H, kept = ctx.saved_tensors
        scaling = ctx.scaling
        dH = dy @ B
        dA = torch.addmm(A, dH.t(), x, beta=0, alpha=scaling).to(ctx.wider)
        dB = torch.addmm(B, dy.t(), H, beta=0, alpha=scaling).to(ctx.wider)
        dx = torch.mm(dy, W)
        if kept is None:
            dx.addmm_(dH, A, alpha=scaling)
        else:
            dx.addcmul_(dH @ A, kept, value=scaling / (1 - ctx.p))
        return dx, None, None, dA, dB, None, None


class RoSA(Function):
    """W None: the adapter alone."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, scaling, values, sparse):
        ctx.dtypes, ctx.scaling, ctx.sparse = (A.dtype, values.dtype), scaling, sparse
        A, B, values = A.to(x.dtype), B.to(x.dtype), values.to(x.dtype)
        M = W if W is None else sparse.weight(W, values)
        y = sparse.y(x, values, None if M is None else F.linear(x, M, b))
        H = F.linear(x, A)
        ctx.save_for_backward(x, M, A, B, H, values)
        return y.addmm_(H, B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, M, A, B, H, values = ctx.saved_tensors
        scaling, (adapter_dtype, values_dtype) = ctx.scaling, ctx.dtypes
        dH = dy @ B
        dA = torch.addmm(A, dH.t(), x, beta=0, alpha=scaling)
        dB = torch.addmm(B, dy.t(), H, beta=0, alpha=scaling)
        dx, dvalues = ctx.sparse.gradients(dy, x, values, None if M is None else torch.mm(dy, M))
        dx.addmm_(dH, A, alpha=scaling)
        return dx, None, None, dA.to(adapter_dtype), dB.to(adapter_dtype), None, dvalues.to(values_dtype), None


class Merged:
    """S scattered into a copy of W, for fp32."""

    def __init__(self, pattern):
        self.shape = pattern.shape
        self.flat = pattern.to_mask().flatten().nonzero()[:, 0]

    def weight(self, W, values):
        return torch.index_add(W.view(-1), 0, self.flat, values).view(self.shape)

    def y(self, x, values, y):
        return y

    def gradients(self, dy, x, values, dx):
        return dx, self.entries(dy, x)

    def entries(self, dy, x):
        return torch.mm(dy.t(), x).view(-1).index_select(0, self.flat)


class Apart(Merged):
    """S scattered into zeros and multiplied on its own."""

    def weight(self, W, values):
        return W

    def matrix(self, values):
        return values.new_zeros(self.shape[0] * self.shape[1]).index_copy_(0, self.flat, values).view(self.shape)

    def y(self, x, values, y):
        St = self.matrix(values).t()
        return torch.mm(x, St) if y is None else y.addmm_(x, St)

    def gradients(self, dy, x, values, dx):
        S = self.matrix(values)
        return torch.mm(dy, S) if dx is None else dx.addmm_(dy, S), self.entries(dy, x)


class Rows:
    """Three small GEMMs."""

    def __init__(self, pattern):
        self.rows = pattern.to_mask().any(1).nonzero()[:, 0]
        self.in_features = pattern.shape[1]

    def weight(self, W, values):
        return W

    def y(self, x, values, y):
        return y.index_add_(1, self.rows, F.linear(x, values.view(-1, self.in_features)))

    def gradients(self, dy, x, values, dx):
        chosen = dy.index_select(1, self.rows)
        return dx.addmm_(chosen, values.view(-1, self.in_features)), torch.mm(chosen.t(), x).view(-1)


class Columns:
    def __init__(self, pattern):
        self.columns = pattern.to_mask().any(0).nonzero()[:, 0]
        self.out_features = pattern.shape[0]

    def weight(self, W, values):
        return W

    def y(self, x, values, y):
        return y.addmm_(x.index_select(1, self.columns), values.view(self.out_features, -1).t())

    def gradients(self, dy, x, values, dx):
        dvalues = torch.mm(dy.t(), x.index_select(1, self.columns)).view(-1)
        return dx.index_add_(1, self.columns, torch.mm(dy, values.view(self.out_features, -1))), dvalues


def by_hand(case: Case, layer: TinyLayer) -> Callable:
    """Returns y from the layer's tensors, with a backward where gradients are on."""
    arguments = layer.x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, SCALING
    if case.has_sparse:
        unstructured = Merged if case.dtypes == "fp32" else Apart
        sparse = {"row": Rows, "column": Columns}.get(case.structure, unstructured)(layer.pattern)
        return lambda: RoSA.apply(*arguments, layer.values, sparse)
    if case.dropout_p or layer.lora_A.dtype != layer.x.dtype:
        return lambda: WiderLoRA.apply(*arguments, case.dropout_p)
    return lambda: LoRA.apply(*arguments)
