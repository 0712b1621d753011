"""Measures a GPU for `python -m rosa_kernels.tune`: the rates that the heuristics count with, and the fastest block
sizes."""

import datetime
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from tqdm import tqdm

from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.triton import configs
from rosa_kernels.backends.triton.heuristics import LinearAlgorithm
from rosa_kernels.backends.triton.linear import run_kernel
from rosa_kernels.backends.triton.lora import lora_grad, shrink
from rosa_kernels.backends.triton.operands import LinearProblem, Sparse
from rosa_kernels.backends.triton.sddmm import sddmm_blocks, sddmm_tiled
from rosa_kernels.pattern import CSRPattern

FEATURES, RANK, DENSITY = 4096, 16, 0.01
TOKENS = (8, 32, 64, 512, 4096)
"""One for each of configs.TOKEN_BUCKETS."""
NOISE = 0.97
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Measure:
    """Times calls on one device; `seconds` (a function of a function) replaces the clock in tests."""

    def __init__(self, device: torch.device, seconds: Callable, features: int = FEATURES):
        self.device, self.seconds, self.features = device, seconds, features
        self.pattern = CSRPattern.random((features, features), DENSITY, seed=0).to(device)

    def normal(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size, device=self.device).to(dtype)

    def rates(self) -> dict[str, float]:
        """The fields of device_rates.Rates."""
        n, T = self.features, TOKENS[-1]
        flops = 2 * T * n * n
        x, weight = self.normal(T, n), self.normal(n, n)
        library = self.seconds(lambda: F.linear(x, weight))
        ours = self.seconds(lambda: run_kernel(LinearProblem(x, n, weight), LinearAlgorithm("kernel"), None))
        x32, weight32 = x.float(), weight.float()
        by_precision = {}
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            for precision in ("tf32", "ieee"):
                torch.backends.cuda.matmul.fp32_precision = precision
                by_precision[precision] = flops / self.seconds(lambda: F.linear(x32, weight32))
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        large, copy = (torch.empty(16 * n * n, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        nothing = self.normal(1)
        return {
            "flops_16_bit": flops / library,
            "flops_tf32": by_precision["tf32"],
            "flops_fp32": by_precision["ieee"],
            "bandwidth": 2 * large.nbytes / self.seconds(lambda: copy.copy_(large)),
            "l2_bandwidth": self._gathered_bytes_per_second(),
            "multiprocessors": hardware.multiprocessors(self.device),
            "kernel_efficiency": library / ours,
            "launch_seconds": self.seconds(lambda: nothing.zero_()),
        }

    def _gathered_bytes_per_second(self) -> float:
        """What a gather by entry, from an x whose tokens lie next to each other, reads from L2 in a second."""
        T, n = 1024, self.features
        values = self.normal(self.pattern.nnz)
        S = Sparse(values, self.pattern.crow_indices, self.pattern.col_indices, 0, self.pattern.shape)
        x = self.normal(n, T).T
        problem = LinearProblem(x, n, S=S)
        seconds = self.seconds(lambda: run_kernel(problem, LinearAlgorithm("", "", "gather"), None))
        return self.pattern.nnz * T * x.element_size() / seconds

    def config_calls(self, element_size: int, tokens: int) -> dict[str, Callable]:
        """A representative call of each tuned kernel."""
        n, dtype = self.features, DTYPES[element_size]
        sizes = (tokens, n), (tokens, n), (n, n), (RANK, n), (n, RANK)
        x, dy, weight, A, B = (self.normal(*size, dtype=dtype) for size in sizes)
        H = self.normal(tokens, RANK, dtype=dtype)
        crow, col = self.pattern.crow_indices, self.pattern.col_indices
        chosen = torch.rand(n // 16, n // 16, generator=torch.Generator().manual_seed(0)) < DENSITY
        blocks = CSRPattern.from_blocks(chosen, 16, (n, n)).to(self.device)
        in_kernel = LinearProblem(x, n, weight, None, A, B, 2.0)
        return {
            configs.LINEAR: lambda: run_kernel(in_kernel, LinearAlgorithm("kernel", "known"), H),
            configs.SHRINK: lambda: shrink(x, A, dtype),
            configs.LORA_GRAD: lambda: lora_grad(dy, H, B, 2.0, features_first=True, B=B),
            configs.SDDMM_TILED: lambda: sddmm_tiled(dy, x, crow, col, dtype),
            configs.SDDMM_BLOCKS: lambda: sddmm_blocks(dy, x, blocks.crow_indices, blocks.col_indices, dtype),
        }

    def configs(self) -> dict[str, str]:
        """{config_key: label of the fastest in its list}; the default unless another is clearly faster."""
        fastest = {}
        cases = [(size, bucket, tokens) for size in DTYPES for bucket, tokens in enumerate(TOKENS)]
        for size, bucket, tokens in tqdm(cases, desc="block sizes", unit="bucket"):
            for kernel, call in self.config_calls(size, tokens).items():
                listed = configs.configs(kernel, hardware.architecture(self.device), size, bucket)
                key = device_rates.config_key(kernel, size, bucket)
                took = {config.label: self._seconds_with(key, config.label, call) for config in listed}
                best = min(took, key=took.get)
                fastest[key] = best if took[best] < NOISE * took[listed[0].label] else listed[0].label
        return fastest

    def _seconds_with(self, key: str, label: str, call: Callable) -> float:
        device_rates.use_table(self.device, {"rates": {}, "configs": {key: label}})
        return self.seconds(call)


def median_seconds(call: Callable) -> float:
    """On the GPU alone: captured in a CUDA graph, so that the time to launch from Python is not in it."""
    return triton.testing.do_bench_cudagraph(call, return_mode="median") * 1e-3


def measure(device: torch.device) -> dict:
    """The device's table, for device_rates.write_table. The rates are measured with the block sizes just chosen."""
    with torch.cuda.device(device):
        measured = Measure(device, median_seconds)
        chosen = measured.configs()
        device_rates.use_table(device, {"rates": {}, "configs": chosen})
        return {
            "device": torch.cuda.get_device_name(device),
            "triton": triton.__version__,
            "torch": torch.__version__,
            "configs": chosen,
            "rates": measured.rates(),
            "date": datetime.date.today().isoformat(),
        }
