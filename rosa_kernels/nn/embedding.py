"""nn.Embedding with a low-rank adapter, an adapter of whole token rows, or both; plain PyTorch on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_kernels import jagged, transforms
from rosa_kernels.nn.layer import AdapterLayer
from rosa_kernels.pattern import ROW, CSRPattern


class RoSAEmbedding(AdapterLayer):
    """An nn.Embedding with a low-rank adapter, a sparse adapter of whole token rows, or both; W is frozen.

    y[t] = W[ids[t]] + scaling · B A[:, ids[t]] + S[ids[t]]. The column of A that belongs to ``padding_idx`` gets no
    gradient, and S no row there.

    Args:
        base_layer: an nn.Embedding (num_embeddings, embedding_dim) without max_norm.
        r: the rank, at least 0. The parameter ``lora_embedding_A.default`` is (r, num_embeddings), zero at first;
            ``lora_embedding_B.default`` is (embedding_dim, r). These are PEFT's names and shapes.
        lora_alpha: the numerator of scaling, which is lora_alpha / r.
        density: the share in [0, 1] of the token rows that S may hold, at least one row where it is not 0. The
            parameter ``values.default`` has as many times embedding_dim entries, zero at first. They take part once
            select_masks or place_pattern says which rows they are.
        pattern: a CSRPattern (num_embeddings, embedding_dim) of whole rows that says so from the start.
        use_rslora: scaling is lora_alpha / sqrt(r) (arXiv 2312.03732).
        adapter_name: the last part of the parameters' names, in place of "default".

    Raises:
        ValueError: a number is out of its range, the pattern has other entries than whole rows or one for padding_idx,
            or base_layer has a max_norm.
        TypeError: an argument has the wrong Python type, or base_layer is not exactly an nn.Embedding, as what a
            subclass adds could be lost.
    """

    factor_names = ("lora_embedding_A", "lora_embedding_B")

    def __init__(
        self, base_layer: nn.Embedding, r: int, lora_alpha: float, density: float = 0.01,
        pattern: CSRPattern | None = None, *, use_rslora: bool = False, adapter_name: str = "default",
    ):  # fmt: skip
        if type(base_layer) is not nn.Embedding:
            raise TypeError(f"base_layer: expected exactly an nn.Embedding, got {type(base_layer).__name__}")
        if base_layer.max_norm is not None:
            raise ValueError("base_layer: expected max_norm=None; it rewrites the frozen weight at every look-up")
        super().__init__(
            base_layer,
            r=r,
            lora_alpha=lora_alpha,
            density=density,
            pattern=pattern,
            structure="row",
            use_rslora=use_rslora,
            adapter_name=adapter_name,
        )

    def _new_factors(self, factory: dict) -> tuple[Tensor, Tensor]:
        vocabulary, dim = self.weight_shape
        return torch.zeros(self.r, vocabulary, **factory), torch.randn(dim, self.r, **factory)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.base_layer.num_embeddings, self.base_layer.embedding_dim

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base_layer.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx

    def place_pattern(self, pattern: CSRPattern) -> None:
        if pattern.nnz and pattern.structure != ROW:
            raise ValueError(f"pattern: expected whole rows, got {pattern}")
        padding = self.padding_idx
        if padding is not None and pattern.crow_indices[padding] != pattern.crow_indices[padding + 1]:
            raise ValueError(f"pattern: expected no row for padding_idx {padding}")
        super().place_pattern(pattern)

    def _factor_product(self, dtype: torch.dtype) -> Tensor:
        A, B = self._factors()
        return A.to(dtype).T @ B.to(dtype).T

    def forward(self, input: Tensor) -> Tensor:
        """Integer token ids (...) -> (..., embedding_dim) in the base weight's dtype."""
        if self.merged or not self.adapter_enabled:
            return self.base_layer(input)
        if input.is_nested:
            return jagged.on_values(self.forward, input)
        if self._adapts_rows(input):
            return F.embedding(input, self._adapted_weight()).to(self.weight.dtype)
        y = self.base_layer(input)
        total = y + self._low_rank(input) if self.r else y
        if self.masks_selected and self.sparse_values.shape[0]:
            total = total + self._token_rows(input)
        return total.to(y.dtype)

    def _adapts_rows(self, ids: Tensor) -> bool:
        """Whether there are fewer rows to adapt than tokens to look up.

        Not where the base layer has hooks, which must run, nor under tracing, where the number of tokens may change,
        nor under torch.func's transforms, which allow no writing in place.
        """
        adapted = self.r or (self.masks_selected and self.sparse_values.shape[0])
        return (
            bool(adapted)
            and not torch.compiler.is_compiling()
            and not transforms.active()
            and self.has_standard_base
            and ids.numel() > self.num_embeddings
        )

    def _adapted_weight(self) -> Tensor:
        """W + scaling · (B A)ᵀ + S (num_embeddings, embedding_dim) in float32, or in float64 over a float64 base."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        table = self.weight.to(dtype)
        # Autocast does not cast an embedding's look-up, so the adapted table must not be cast either.
        with torch.autocast(table.device.type, enabled=False):
            if self.r:
                A, B = (factor.to(dtype) for factor in self._factors())
                A = _without_gradient_at(A, self.padding_idx)
                table = torch.addmm(table, A.T, B.T, alpha=self.scaling)
            if self.masks_selected and self.sparse_values.shape[0]:
                rows = self.sparse_values.to(dtype).view(-1, self.embedding_dim)
                # With a low-rank part the table is a tensor of its own, and no longer the weight itself.
                add = table.index_add_ if self.r else table.index_add
                table = add(0, self._adapted_tokens(rows.shape[0]), rows)
        return table

    def _adapted_tokens(self, count: int) -> Tensor:
        """The tokens that have a row in S, of which there are ``count``."""
        crow = self._pattern_buffers.crow_indices
        starts = torch.arange(count, dtype=crow.dtype, device=crow.device) * self.embedding_dim
        return torch.searchsorted(crow, starts, right=True) - 1

    def _low_rank(self, ids: Tensor) -> Tensor:
        A, B = self._factors()
        return F.linear(F.embedding(ids, A.T, self.padding_idx), self.scaling * B)

    def _token_rows(self, ids: Tensor) -> Tensor:
        """S[ids] (..., embedding_dim), zero for tokens without a row of their own."""
        dim = self.embedding_dim
        crow = self._pattern_buffers.crow_indices
        row_of_token = torch.where(crow.diff() > 0, crow[:-1] // dim + 1, 0)  # from 1 on; 0: a row of zeros
        rows = F.pad(self.sparse_values.view(-1, dim), (0, 0, 1, 0))
        return F.embedding(row_of_token[ids], rows, padding_idx=0)


def _without_gradient_at(A: Tensor, padding_idx: int | None) -> Tensor:
    """A (r, num_embeddings), whose column at padding_idx hands no gradient on, as in a look-up with padding_idx."""
    if padding_idx is None or not A.requires_grad:
        return A
    before, padding, after = A.tensor_split((padding_idx, padding_idx + 1), dim=1)
    return torch.cat([before, padding.detach(), after], 1)
