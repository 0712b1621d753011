"""A CSRPattern as the buffers of a module, so that .to(), state_dict() and deepcopy take it along."""

from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.pattern import UNSTRUCTURED, CSRPattern, block_structure, consists_of_blocks


class PatternBuffers(nn.Module):
    """Where a layer's S may be non-zero, once a pattern is placed.

    ``crow_indices`` and ``col_indices`` (int32) are in the state dict, both empty before that. The pattern by columns,
    which the backward needs, is computed from them again. Indices that come from a state dict are checked.

    Args:
        shape: (out_features, in_features) of S.
        block_size: side of the squares where S is meant to consist of squares, else None.
        device: where the buffers live.
    """

    crow_indices: Tensor
    col_indices: Tensor
    ccol_indices: Tensor
    row_indices: Tensor
    permutation: Tensor

    _PERSISTENT = ("crow_indices", "col_indices")
    _TRANSPOSED = ("ccol_indices", "row_indices", "permutation")

    def __init__(self, shape: tuple[int, int], block_size: int | None, device: torch.device):
        super().__init__()
        self.shape = shape
        self.block_size = block_size
        self.structure = UNSTRUCTURED
        empty = torch.empty(0, dtype=torch.int32, device=device)
        for name in self._PERSISTENT:
            self.register_buffer(name, empty.clone())
        for name in self._TRANSPOSED:
            self.register_buffer(name, empty.clone(), persistent=False)

    @property
    def selected(self) -> bool:
        """Whether a pattern has been placed, one without entries included."""
        return self.crow_indices.shape[0] > 0

    def place(self, pattern: CSRPattern) -> None:
        """Make this the pattern, on the device where the buffers are."""
        if pattern.shape != self.shape:
            raise ValueError(f"pattern: expected shape {self.shape}, got {pattern.shape}")
        pattern = pattern.to(self.crow_indices.device)
        self.structure = pattern.structure
        size = self.block_size
        if size is not None and self.structure == UNSTRUCTURED and consists_of_blocks(pattern, size):
            self.structure = block_structure(size)
        self.crow_indices, self.col_indices = pattern.crow_indices, pattern.col_indices
        self.ccol_indices, self.row_indices, self.permutation = pattern.transpose()

    def pattern(self) -> CSRPattern | None:
        """The placed pattern, around the buffers themselves: no copy, no validation, no synchronisation."""
        buffers: dict[str, Any] = self._buffers  # every forward: no detour by __getattr__
        crow_indices = buffers["crow_indices"]
        if crow_indices.shape[0] == 0:
            return None
        transposed = (buffers["ccol_indices"], buffers["row_indices"], buffers["permutation"])
        return CSRPattern._trusted(crow_indices, buffers["col_indices"], self.shape, self.structure, transposed)

    def clear(self) -> None:
        """Forget the pattern, as if none had been placed."""
        for name in (*self._PERSISTENT, *self._TRANSPOSED):
            setattr(self, name, torch.empty(0, dtype=torch.int32, device=self.crow_indices.device))
        self.structure = UNSTRUCTURED

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        absent = [name for name in self._PERSISTENT if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(prefix + name for name in absent)
            return
        crow, col = (state_dict[prefix + name] for name in self._PERSISTENT)
        if self.crow_indices.is_meta:
            self.to_empty(device=col.device)
        if crow.numel() == 0 and col.numel() == 0:
            self.clear()
            return
        try:
            self.place(CSRPattern(crow.clone(), col.clone(), self.shape))
        except ValueError as error:
            error_msgs.append(f"{prefix[:-1]}: {error}")

    def extra_repr(self) -> str:
        return repr(self.pattern()) if self.selected else f"shape={self.shape}, not selected"
