"""A CSRPattern as the buffers of a module, so that .to(), state_dict and deepcopy carry it along."""

import torch
from torch import Tensor, nn

from rosa_kernels.pattern import BLOCK, UNSTRUCTURED, CSRPattern


class PatternBuffers(nn.Module):
    """Where a layer's S may be non-zero, or that nobody has chosen yet.

    ``crow_indices`` and ``col_indices`` (int32) are in the state dict, both empty until a pattern is placed; what
    the backward needs of the transpose is made again from them. Indices that come from a state dict are validated.

    Args:
        shape: (out_features, in_features) of S.
        block_size: side of the squares where S is meant to consist of squares, else None.
        device: where the buffers live.
    """

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
        self.crow_indices, self.col_indices = pattern.crow_indices, pattern.col_indices
        self.ccol_indices, self.row_indices, self.permutation = pattern.transpose()

    def pattern(self) -> CSRPattern:
        """The placed pattern, around the buffers themselves: no copy, no validation, no synchronisation."""
        transposed = (self.ccol_indices, self.row_indices, self.permutation)
        return CSRPattern._trusted(self.crow_indices, self.col_indices, self.shape, self.structure, transposed)

    def validated(self, crow_indices: Tensor, col_indices: Tensor) -> CSRPattern:
        """The pattern of indices from outside. Raises ValueError as CSRPattern does."""
        pattern = CSRPattern(crow_indices, col_indices, self.shape)
        if self.block_size is not None and pattern.structure == UNSTRUCTURED:
            size = self.block_size
            grid = torch.zeros(-(-self.shape[0] // size), -(-self.shape[1] // size), dtype=torch.bool)
            grid[pattern.row_of_entry().cpu() // size, pattern.col_indices.cpu().long() // size] = True
            if CSRPattern.from_blocks(grid, size, self.shape) == pattern.to("cpu"):
                pattern.structure = BLOCK
        return pattern

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        absent = [name for name in self._PERSISTENT if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(prefix + name for name in absent)
            return
        crow, col = (state_dict[prefix + name] for name in self._PERSISTENT)
        device = col.device if self.crow_indices.is_meta else self.crow_indices.device
        if crow.numel() == 0 and col.numel() == 0:
            for name in (*self._PERSISTENT, *self._TRANSPOSED):
                setattr(self, name, torch.empty(0, dtype=torch.int32, device=device))
            return
        try:
            pattern = self.validated(crow.clone(), col.clone())
        except ValueError as error:
            error_msgs.append(f"{prefix[:-1]}: {error}")
            return
        if self.crow_indices.is_meta:
            self.crow_indices = self.crow_indices.new_empty(0, device=device)
        self.place(pattern)

    def extra_repr(self) -> str:
        return repr(self.pattern()) if self.selected else f"shape={self.shape}, not selected"
