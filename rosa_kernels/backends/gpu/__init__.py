"""What Triton and CUDA share: the cost model, and what is known of a GPU."""
