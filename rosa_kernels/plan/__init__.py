"""Which way is cheapest, by counting FLOPs and bytes: cpu.py for the C++ kernels, gpu.py for the Triton kernels."""
