"""How the tests are multiplied over backends, dtypes and devices, and which of them a run takes.

A test that asks for `backend` (`dtype`, `device`) runs on each backend, with each dtype that it serves: always on CPU
tensors, and where it asks for `device` on a GPU too, if there is one (`-m gpu` picks those). Of all these, a run takes
the default tier of tiers.py, or everything with --exhaustive.

Three environment variables make another run of it, on CPU tensors, with one backend:
TRITON_INTERPRET=1, set before Triton is imported, interprets the Triton backend;
CUDA_EMULATED=library (of cuda_emulation.build) emulates the CUDA backend;
CPU_EMULATED=library (of cpu_emulation.build) emulates the CPU backend's instructions for bf16.
"""

import os

# This comes before torch loads OpenMP. Workers that spin between two small ops starve each other on shared cores (20x).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

import interpreter_subset
import rosa_kernels as rk
import tiers
from paths import TESTS
from rosa_kernels.backends.triton import heuristics
from rosa_kernels.dispatch import refusal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("CUDA_EMULATED")
CPU_EMULATED = os.environ.get("CPU_EMULATED")
LEFT_TO_EXHAUSTIVE = pytest.StashKey[int]()
BACKENDS_ON_CPU_TENSORS = ("triton",) if INTERPRETED else ("cuda",) if EMULATED else ("reference", "cpu")
BACKENDS_ON_GPU_TENSORS = ("triton", "cuda", "reference")

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if INTERPRETED:
    import interpreter_guard

    interpreter_guard.install()

if EMULATED:
    import cuda_emulation

    cuda_emulation.install(EMULATED)

if CPU_EMULATED:
    import cpu_emulation

    cpu_emulation.install(CPU_EMULATED)


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run every test (some 25 minutes on two cores), not the selection of support/tiers.py (3 to 4 minutes)",
    )
    parser.addoption(
        "--beyond-default",
        action="store_true",
        help="run what a run without options has left to --exhaustive",
    )
    parser.addoption(
        "--part", metavar="K/N", help="run every N-th test only, from the K-th on (K from 0): N processes share a run"
    )
    parser.addoption("--fuzz", metavar="N", type=int, help="ops/test_fuzz.py: N cases of the differential fuzzer")
    parser.addoption(
        "--fuzz-seed",
        metavar="S",
        type=int,
        help="ops/test_fuzz.py: the case of seed S alone; with --fuzz, N from it on",
    )
    parser.addoption(
        "--all-kernels", action="store_true", help="triton/test_aot.py: all 10,000 kernels, not a sample (hours)"
    )
    parser.addoption("--compile-table", metavar="FILE", help="triton/test_aot.py: write its table there, as markdown")
    parser.addoption("--cuda-compile-table", metavar="FILE", help="the same for cuda/test_compile.py")


def pytest_configure(config):
    torch.set_num_threads(1 if INTERPRETED or EMULATED else min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(config, items):
    """What of this folder's tests runs here; those of other folders (bench/) are left alone."""
    own = [item for item in items if TESTS in item.path.parents]
    taken = [item for item in own if _runs_here(item)]
    if not tiers.is_exhaustive(config):
        taken, fitting = tiers.default_tier(taken), len(taken)
        config.stash[LEFT_TO_EXHAUSTIVE] = fitting - len(taken)
    elif config.getoption("--beyond-default"):
        taken = tiers.beyond_default(taken)
    if part := config.getoption("part"):
        first, parts = map(int, part.split("/"))
        taken = taken[first::parts]
    if left_out := set(own) - set(taken):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _runs_here(item) -> bool:
    if INTERPRETED:
        return interpreter_subset.takes(item)
    if EMULATED:
        return cuda_emulation.takes(item)
    if CPU_EMULATED:
        return cpu_emulation.takes(item)
    return not item.get_closest_marker("gpu") or interpreter_subset.takes_on_gpu(item)


def pytest_terminal_summary(terminalreporter, config):
    if left := config.stash.get(LEFT_TO_EXHAUSTIVE, 0):
        terminalreporter.write_line(f"{left} more tests run with --exhaustive (docs/testing.md)")


def _backends(on_gpu_too: bool):
    """(name in the test's id, backend, device, marks)."""
    for backend in BACKENDS_ON_CPU_TENSORS:
        yield backend, backend, CPU, ()
    if on_gpu_too and torch.cuda.is_available() and not INTERPRETED:
        for backend in BACKENDS_ON_GPU_TENSORS:
            yield f"{backend}-cuda", backend, torch.device("cuda", torch.cuda.current_device()), (pytest.mark.gpu,)


def _parameters(names: list[str]):
    """One set of values for `names`, a subset of backend, dtype and device, for each combination that is served."""
    for name, backend, device, marks in _backends(on_gpu_too="device" in names):
        reason = rk.available_backends()[backend]
        if reason is not None:
            skip = pytest.mark.skip(reason=f"backend {backend}: {reason}")
            yield pytest.param(*({"backend": backend}.get(n) for n in names), id=name, marks=(*marks, skip))
            continue
        for dtype_name, dtype in DTYPES.items() if "dtype" in names else [("", None)]:
            if dtype is None or refusal(backend, device, dtype) is None:
                values = {"backend": backend, "dtype": dtype, "device": device}
                yield pytest.param(*(values[n] for n in names), id=f"{name}-{dtype_name}".strip("-"), marks=marks)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = [name for name in ("backend", "dtype", "device") if name in metafunc.fixturenames]
        metafunc.parametrize(",".join(names), list(_parameters(names)), indirect=["backend"])


@pytest.fixture
def backend(request):
    """The name of the backend that serves every op of the test."""
    with rk.use_backend(request.param):
        yield request.param


if INTERPRETED or EMULATED:

    @pytest.fixture(autouse=True)
    def _low_rank_gradients_by_the_kernels(monkeypatch):
        """For such small calls the library would make them; triton/test_algorithms.py tests that too."""
        monkeypatch.setattr(heuristics, "low_rank_gradients_by_library", lambda *sizes: False)


@pytest.fixture
def exhaustive(request) -> bool:
    """Whether this run is one of everything: for tests that start runs of their own, as long as the tier allows."""
    return tiers.is_exhaustive(request.config)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
