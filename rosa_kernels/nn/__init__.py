"""Layers with an adapter beside a frozen base layer."""

from rosa_kernels.nn.embedding import RoSAEmbedding
from rosa_kernels.nn.layer import AdapterLayer
from rosa_kernels.nn.linear import LoRALinear, RoSALinear

__all__ = ["AdapterLayer", "LoRALinear", "RoSAEmbedding", "RoSALinear"]
