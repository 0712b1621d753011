"""What Triton and CUDA share: the ops, their algorithms by library GEMMs, the cost model, and what is known of a
GPU."""
