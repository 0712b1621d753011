"""Which backend serves a call: by name, by environment, by choice, and what a refusal says."""

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import rosa_kernels as rk
from rosa_kernels import dispatch
from rosa_kernels.backends import cuda, triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PATTERN = rk.CSRPattern.random((5, 6), 0.4, seed=0)


NEEDS_CPU_KERNELS = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"two backends are needed: {rk.available_backends()['cpu']}"
)


def spmm(dtype=torch.float32):
    return rk.spmm(torch.randn(3, 6, dtype=dtype), torch.randn(PATTERN.nnz, dtype=dtype), PATTERN)


@pytest.fixture
def served_by(monkeypatch):
    """The names of the backends that spmm, its backward and sddmm reach, in order."""
    calls = []

    def record(name, function):
        def recording(*args):
            calls.append(name)
            return function(*args)

        return recording

    for name, module in dispatch.BACKENDS.items():
        for op in ("spmm", "rosa_linear_backward", "sddmm"):
            if hasattr(module, op):
                monkeypatch.setattr(module, op, record(name, getattr(module, op)))
    return calls


def test_available_backends_says_why_not():
    reasons = rk.available_backends()
    assert {"reference", "cpu", "triton", "cuda"} <= reasons.keys() and reasons["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values())


def test_the_named_backend_serves(backend, served_by):
    spmm()
    assert served_by == [backend]


def test_auto_prefers_kernels_and_falls_to_the_reference_only_for_what_they_refuse(served_by):
    with rk.use_backend("auto"):
        spmm()
        spmm(torch.float64)
    fastest = "cpu" if rk.available_backends()["cpu"] is None else "reference"
    assert served_by == [fastest, "reference"]


def test_the_cpu_backend_serves_its_promised_dtypes():
    if rk.available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {rk.available_backends()['cpu']}")
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.refusal("cpu", CPU, dtype) is None
    assert dispatch.refusal("cpu", CPU, torch.float64) and dispatch.refusal("cpu", torch.device("meta"), torch.float32)


def test_a_named_backend_never_hands_a_call_on():
    with rk.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was asked for and cannot serve .*: .+"):
        spmm(torch.float64)


class TestTriton:
    """Whom the Triton backend serves; that it serves rightly is for test_ops."""

    @pytest.fixture(autouse=True)
    def _not_interpreted(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    @pytest.fixture
    def h100(self, monkeypatch):
        """As on a machine with such a GPU."""
        monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def test_without_triton_the_reason_names_the_command_that_installs_it(self, monkeypatch):
        monkeypatch.setattr(triton, "triton", None)
        assert f"{sys.executable} -m pip install triton" in rk.available_backends()["triton"]

    def test_without_a_gpu_the_reason_says_so(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA or ROCm device" in dispatch.refusal("triton", GPU, torch.float32)

    def test_by_name_it_refuses_cpu_tensors(self):
        refused = "'triton' was asked for and cannot serve .* on cpu: .+"
        with rk.use_backend("triton"), pytest.raises(RuntimeError, match=refused):
            spmm()

    def test_cpu_tensors_are_for_the_interpreter(self, h100, monkeypatch):
        assert "not on cpu" in dispatch.refusal("triton", CPU, torch.float32)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert dispatch.refusal("triton", CPU, dtype) is None
        assert "not float64" in dispatch.refusal("triton", CPU, torch.float64)

    def test_auto_gives_it_gpu_tensors_of_the_dtypes_that_it_computes(self, h100):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert dispatch.automatic_choice(GPU, dtype) == "triton"
        assert "not float64" in dispatch.refusal("triton", GPU, torch.float64)
        assert dispatch.automatic_choice(GPU, torch.float64) == "reference"

    def test_auto_never_gives_it_cpu_tensors(self, h100, monkeypatch):
        dtypes = torch.float32, torch.bfloat16, torch.float16, torch.float64
        chosen = [dispatch.automatic_choice(CPU, dtype) for dtype in dtypes]
        assert "triton" not in chosen
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert chosen == [dispatch.automatic_choice(CPU, dtype) for dtype in dtypes]

    def test_gpus_older_than_ampere_go_to_the_reference(self, h100, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "compute capability 8.0" in dispatch.refusal("triton", GPU, torch.float16)
        assert dispatch.automatic_choice(GPU, torch.float16) == "reference"

    def test_interpreted_it_serves_by_name_and_refuses_float64(self):
        pytest.importorskip("triton", reason="backend triton: Triton is not installed")
        code = """if True:
            import torch, rosa_kernels as rk
            pattern = rk.CSRPattern.random((5, 6), 0.4, seed=0)
            def spmm(dtype):
                return rk.spmm(torch.ones(3, 6, dtype=dtype), torch.ones(pattern.nnz, dtype=dtype), pattern)
            with rk.use_backend("triton"):
                print(torch.equal(spmm(torch.float32), torch.ones(3, 6) @ pattern.to_mask().T.float()))
                spmm(torch.float64)
        """
        run = in_a_new_process(code, TRITON_INTERPRET="1")
        assert run.stdout.strip() == "True", run.stderr
        assert run.returncode == 1
        assert "RuntimeError: backend 'triton' was asked for and cannot serve torch.float64" in run.stderr


class TestCuda:
    """Whom the CUDA backend serves; that it serves rightly is for test_ops."""

    @pytest.fixture
    def h100(self, monkeypatch):
        """As on a machine with such a GPU, the kernels built, and no Triton."""
        monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
        monkeypatch.setattr(triton, "unavailable_reason", lambda: "Triton is not installed")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    @pytest.fixture
    def reason(self, monkeypatch):
        """unavailable_reason, asked anew, of a CUDA build of PyTorch."""
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        cuda.unavailable_reason.cache_clear()
        yield cuda.unavailable_reason
        cuda.unavailable_reason.cache_clear()

    def test_without_a_cuda_build_of_pytorch_the_reason_says_so(self, reason, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert reason() == "this PyTorch is built without CUDA"

    def test_where_it_was_not_built_the_reason_names_what_builds_it(self, reason, monkeypatch, tmp_path):
        monkeypatch.setattr(cuda, "_BINARY", tmp_path / "_cuda.abi3.so")
        assert "the CUDA 13.0 toolkit (nvcc)" in reason() and "ROSA_KERNELS_BUILD=cuda pip install -e ." in reason()

    def test_without_a_gpu_the_reason_says_so(self, reason, monkeypatch, tmp_path):
        library = tmp_path / "_cuda.abi3.so"
        library.write_bytes(b"not loaded")
        monkeypatch.setattr(cuda, "_BINARY", library)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert reason() == "no CUDA device"

    def test_a_library_that_does_not_load_is_a_reason(self, reason, monkeypatch, tmp_path):
        library = tmp_path / "_cuda.abi3.so"
        library.write_bytes(b"not a library")
        monkeypatch.setattr(cuda, "_BINARY", library)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.warns(UserWarning, match="does not load"):
            said = reason()
        assert str(library) in said and "does not load" in said

    def test_a_library_of_other_sources_says_what_it_lacks(self, reason, monkeypatch, tmp_path):
        library = tmp_path / "_cuda.abi3.so"
        library.write_bytes(b"taken as loaded")
        monkeypatch.setattr(cuda, "_BINARY", library)
        monkeypatch.setattr(cuda, "_OPS", ("made_up",))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
        with pytest.warns(UserWarning, match="other sources"):
            assert "lacks made_up" in reason()

    def test_auto_gives_it_gpu_tensors_where_triton_serves_none(self, h100, monkeypatch):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert dispatch.automatic_choice(GPU, dtype) == "cuda"
        assert "not float64" in dispatch.refusal("cuda", GPU, torch.float64)
        assert dispatch.automatic_choice(GPU, torch.float64) == "reference"
        assert "not on cpu" in dispatch.refusal("cuda", CPU, torch.float32)
        monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
        assert dispatch.automatic_choice(GPU, torch.float32) == "triton"
        assert dispatch.automatic_choice(GPU, torch.float32, host_bound=True) == "cuda"
        assert dispatch.automatic_choice(GPU, torch.float64, host_bound=True) == "reference"
        monkeypatch.setattr(cuda, "unavailable_reason", lambda: "not built")
        assert dispatch.automatic_choice(GPU, torch.float32, host_bound=True) == "triton"

    def test_auto_gives_it_small_calls_beside_triton(self, h100, monkeypatch):
        """By x's size: few tokens of many features, many tokens of few features."""
        monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
        monkeypatch.setattr(dispatch, "_served", {})

        class OnGPU(NamedTuple):
            shape: torch.Size
            device: torch.device = GPU
            dtype: torch.dtype = torch.bfloat16
            is_cuda: bool = True
            dim: Callable = lambda: 2

            def numel(self):
                return self.shape.numel()

        for shape, serves in (((255, 4096), cuda), ((256, 4096), triton), ((4096, 768), cuda), ((8192, 768), triton)):
            assert dispatch.backend_for(OnGPU(torch.Size(shape))) is serves

    def test_gpus_older_than_ampere_go_to_the_reference(self, h100, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "compute capability 8.0" in dispatch.refusal("cuda", GPU, torch.float16)
        assert dispatch.automatic_choice(GPU, torch.float16) == "reference"


def test_use_backend_nests_and_is_undone_by_an_error(served_by):
    with rk.use_backend("auto"):
        with rk.use_backend("reference"):
            with rk.use_backend("auto"):
                pass
            spmm()
        with pytest.raises(KeyError), rk.use_backend("reference"):
            raise KeyError
        assert dispatch.chosen() == "auto"
    assert served_by == ["reference"]


@NEEDS_CPU_KERNELS
def test_the_choice_holds_for_its_thread_alone(served_by):
    thread = threading.Thread(target=spmm)
    with rk.use_backend("reference"):
        thread.start()
        thread.join()
    assert served_by == ["cpu"]


@NEEDS_CPU_KERNELS
def test_two_threads_with_blocks_that_overlap(served_by):
    """The first block closes while the second is open: each thread keeps its own choice, and nothing is left behind."""
    opened, closed = threading.Event(), threading.Event()

    def second():
        with rk.use_backend("reference"):
            opened.set()
            closed.wait()
            spmm()

    thread = threading.Thread(target=second)
    with rk.use_backend("cpu"):
        thread.start()
        opened.wait()
        spmm()
    closed.set()
    thread.join()
    assert served_by == ["cpu", "reference"] and dispatch.chosen() == "auto"


@NEEDS_CPU_KERNELS
def test_the_choice_holds_for_its_asyncio_task_alone(served_by):
    async def chooses(name, before, after):
        with rk.use_backend(name):
            await before.wait()
            spmm()
            after.set()

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        first.set()
        await asyncio.gather(chooses("cpu", second, asyncio.Event()), chooses("reference", first, second))

    asyncio.run(both())
    assert served_by == ["reference", "cpu"] and dispatch.chosen() == "auto"


@NEEDS_CPU_KERNELS
@pytest.mark.parametrize("through_dispatcher", [False, True])
def test_a_backward_runs_where_its_forward_ran(backend, served_by, through_dispatcher):
    """The block is closed when the backward runs, in another thread besides: neither changes its backend."""
    x = torch.randn(3, 6, requires_grad=True)
    values = torch.randn(PATTERN.nnz, requires_grad=True)
    with rk.use_backend("reference" if backend == "cpu" else "cpu"):
        args = (x, values, PATTERN.crow_indices, PATTERN.col_indices, PATTERN.structure)
        y = torch.ops.rosa_kernels.spmm(*args) if through_dispatcher else rk.spmm(x, values, PATTERN)
    del served_by[1:]
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert len(served_by) == 2 and len(set(served_by)) == 1 and served_by[0] != backend


@NEEDS_CPU_KERNELS
def test_a_thread_that_python_did_not_start_takes_the_open_block(served_by):
    """Such are PyTorch's threads for the backward of GPU tensors."""
    with rk.use_backend("cpu"), rk.use_backend("reference"):
        with rk.use_backend("cpu"):
            pass
        run_in_a_foreign_thread(spmm)
    run_in_a_foreign_thread(spmm)
    assert served_by == ["reference", "cpu"]


def run_in_a_foreign_thread(function):
    """Runs a function in a thread of the C library, which Python learns of by the call."""
    entry = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: function() is None or None)
    thread, library = ctypes.c_ulong(), ctypes.CDLL(None)
    assert library.pthread_create(ctypes.byref(thread), None, entry, None) == 0
    assert library.pthread_join(thread, None) == 0


def test_unknown_names():
    for name in ("cuda-graphs", "", "CPU", None):
        with pytest.raises(ValueError, match="use_backend.*reference"), rk.use_backend(name):
            pass


def in_a_new_process(code, backend="auto", **environment):
    environment = os.environ | {"ROSA_KERNELS_BACKEND": backend} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_environment_variable():
    run = in_a_new_process("import rosa_kernels.dispatch as d; print(d.chosen())", "reference")
    assert run.stdout.strip() == "reference", run.stderr


def test_environment_variable_with_an_unknown_name():
    run = in_a_new_process("import rosa_kernels", "fastest")
    assert run.returncode == 1 and "ValueError: ROSA_KERNELS_BACKEND: expected one of" in run.stderr
    assert "'fastest'" in run.stderr
