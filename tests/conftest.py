"""Every test that asks for `backend` (and `dtype`) runs on each backend, with each dtype that it serves."""

import os

# Before torch loads OpenMP: workers that spin between two small ops starve each other where cores are shared (20x here).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

import rosa_kernels as rk
from rosa_kernels.dispatch import refusal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CPU = torch.device("cpu")
BACKENDS_ON_CPU_TENSORS = ("reference", "cpu")

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config):
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def _backend_parameters(with_dtype: bool):
    for backend in BACKENDS_ON_CPU_TENSORS:
        reason = rk.available_backends()[backend]
        if reason is not None:
            skip = pytest.mark.skip(reason=f"backend {backend}: {reason}")
            yield pytest.param(*((backend, None) if with_dtype else (backend,)), id=backend, marks=skip)
        elif not with_dtype:
            yield pytest.param(backend, id=backend)
        else:
            for name, dtype in DTYPES.items():
                if refusal(backend, CPU, dtype) is None:
                    yield pytest.param(backend, dtype, id=f"{backend}-{name}")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = [name for name in ("backend", "dtype") if name in metafunc.fixturenames]
        parameters = list(_backend_parameters(with_dtype="dtype" in names))
        metafunc.parametrize(",".join(names), parameters, indirect=["backend"])


@pytest.fixture
def backend(request):
    """The name of the backend that serves every op of the test."""
    with rk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
