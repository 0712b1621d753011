"""What the Triton and the CUDA backend share: ops, operands, the cost model and library GEMMs with an adapter's
operand."""
