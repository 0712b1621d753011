"""A training step as one CUDA graph."""

from rosa_kernels.graphs.graphed_step import graphed

__all__ = ["graphed"]
