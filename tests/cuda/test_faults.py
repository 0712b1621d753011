"""The emulation that runs the CUDA kernels on the CPU (cuda_emulation.h) catches planted faults and computes as CUDA
does: what test_emulation.py finds no trace of would have been seen.
"""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch

import cuda_emulation

pytestmark = pytest.mark.skipif(
    cuda_emulation.unavailable_reason() is not None, reason=f"no emulation: {cuda_emulation.unavailable_reason()}"
)

THREADS = 64
RUN = f"""
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.run.restype = ctypes.c_char_p
print(library.run(sys.argv[2].encode(), (ctypes.c_float * {THREADS})()).decode())
"""
NO_ERROR = "no error"
INVALID, INVALID_CONFIGURATION = "invalid argument", "invalid configuration argument"


def sanitizer(variant):
    reason = cuda_emulation.unavailable_reason(variant)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(scope="module")
def library():
    loaded = ctypes.CDLL(str(cuda_emulation.build("plain", cuda_emulation.FAULTS)))
    for name in ("run", "launch", "multiply_bfloat16", "multiply_half", "order_of"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=["forward", "reversed"])
def order(request, monkeypatch):
    monkeypatch.setenv("ROSA_EMULATION_ORDER", request.param)
    return request.param


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def run(library, name):
    """(what the launch said, the numbers that came out)."""
    out = torch.zeros(THREADS)
    return library.run(name.encode(), pointer(out)).decode(), out


def run_sanitized(variant, name):
    path = cuda_emulation.build(variant, cuda_emulation.FAULTS)
    environment = os.environ | cuda_emulation.environment(variant) | {"PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-c", RUN, str(path), name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def launch(library, grid=(1, 1, 1), block=(THREADS, 1, 1), shared=4 * THREADS, allowed=0):
    dimensions = ctypes.c_uint * 3
    out = torch.zeros(1024)
    said = library.launch(dimensions(*grid), dimensions(*block), ctypes.c_size_t(shared), allowed, pointer(out))
    return said.decode()


class TestThreads:
    def test_a_sound_kernel_computes(self, library, order):
        said, out = run(library, "sound")
        numbers = torch.arange(63.0, -1, -1).view(2, 32).sum(1)
        assert said == NO_ERROR and torch.equal(out, numbers.repeat_interleave(32))

    @pytest.mark.parametrize(
        "name,message",
        [
            ("divergent_barrier", "threads 0 to 39: __syncthreads at .*; threads 40 to 63: __syncthreads at "),
            ("incomplete_shuffle", "threads 0 to 15: shuffle at .*; threads 16 to 31: __syncthreads at "),
            ("shuffle_from_a_missing_lane", "lane 6 reads lane 7, which takes no part"),
            ("shuffle_from_an_exited_lane", "lane 30 reads lane 31, which takes no part"),
            ("not_in_its_mask", "a lane is not in its own mask: shuffle at "),
            ("mma_without_a_lane", "mma: a lane of the warp has exited"),
        ],
    )
    def test_threads_that_miss_each_other_are_caught(self, library, order, name, message):
        said, _ = run(library, name)
        assert re.search(message, said), said
        assert run(library, "sound")[0] == NO_ERROR  # after which kernels run as before

    @pytest.mark.parametrize("name", ["uninitialised_static", "uninitialised_dynamic"])
    def test_shared_memory_starts_as_nan_in_every_launch(self, library, name):
        for _ in range(2):
            said, out = run(library, name)
            assert said == NO_ERROR and bool(out.isnan().all())

    @pytest.mark.parametrize("name", ["missing_syncthreads", "missing_barrier_before_reuse"])
    def test_a_missing_barrier_shows_in_one_of_the_orders(self, library, monkeypatch, name):
        results = []
        for order in ("forward", "reversed"):
            monkeypatch.setenv("ROSA_EMULATION_ORDER", order)
            results.append(run(library, name)[1])
        assert any(not torch.equal(out, torch.ones(THREADS)) for out in results)

    def test_the_order_turns_round(self, library, monkeypatch):
        ended = {}
        for order in ("forward", "reversed"):
            monkeypatch.setenv("ROSA_EMULATION_ORDER", order)
            out = torch.zeros(3 * 70, 2, dtype=torch.int32)
            assert library.order_of(3, 70, pointer(out)).decode() == NO_ERROR
            ended[order] = [(block, thread) for thread, block in out.tolist()]
        assert ended["forward"] == sorted(ended["forward"]) == ended["reversed"][::-1]
        assert len(set(ended["forward"])) == 210


class TestLaunch:
    """What CUDA refuses is refused."""

    @pytest.mark.parametrize("grid", [(0, 1, 1), (1, 0, 1), (1, 65536, 1), (1, 1, 65536), (2**31, 1, 1)])
    def test_grid(self, library, grid):
        assert launch(library, grid=grid) == INVALID_CONFIGURATION

    @pytest.mark.parametrize("block", [(0, 1, 1), (1025, 1, 1), (64, 17, 1), (1, 1, 65)])
    def test_block(self, library, block):
        assert launch(library, block=block) == INVALID_CONFIGURATION

    def test_limits_are_within(self, library):
        assert launch(library, grid=(3, 2, 2)) == NO_ERROR

    def test_shared_memory(self, library):
        most, optin = 48 << 10, 227 << 10
        assert launch(library, shared=most) == NO_ERROR
        assert launch(library, shared=most + 1) == INVALID
        assert launch(library, shared=optin, allowed=optin) == NO_ERROR
        assert launch(library, shared=most + 1) == INVALID  # allowed back to the default
        assert launch(library, shared=optin + 1, allowed=optin + 1) == INVALID


class TestNumbers:
    @pytest.mark.parametrize("name,dtype", [("bfloat16", torch.bfloat16), ("half", torch.float16)])
    def test_every_pattern_widens_as_in_torch(self, library, name, dtype):
        patterns = torch.arange(65536).to(torch.uint16)
        widened = torch.empty(65536)
        getattr(library, f"widen_{name}")(pointer(patterns), pointer(widened), ctypes.c_int64(65536))
        expected = patterns.view(dtype).float()
        assert torch.equal(widened.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(widened.view(torch.int32)[number], expected.view(torch.int32)[number])

    @pytest.mark.parametrize("name,dtype", [("bfloat16", torch.bfloat16), ("half", torch.float16)])
    def test_floats_round_as_in_torch(self, library, name, dtype):
        """All numbers of dtype, the ties between neighbours, what lies next to those, and a million random patterns."""
        numbers = torch.arange(65536).to(torch.uint16).view(dtype).float()
        numbers = numbers[numbers.isfinite()].unique()
        ties = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
        random = torch.randint(-(2**31), 2**31, (2**20,)).to(torch.int32).view(torch.float32)
        top = torch.tensor([float("inf"), 65504.0, 65519.99, 65520.0, 65536.0, 3.3895e38, 3.4028e38, 0.0])
        floats = torch.cat([numbers, ties, random, top])
        floats = torch.cat([floats, floats.nextafter(top[0]), floats.nextafter(-top[0])])
        floats = torch.cat([floats, -floats])
        rounded = torch.empty(floats.numel(), dtype=torch.uint16)
        getattr(library, f"round_to_{name}")(pointer(floats), pointer(rounded), ctypes.c_int64(floats.numel()))
        nan = floats.isnan()
        assert bool(nan.any()) and torch.equal(rounded.view(dtype).isnan(), nan)
        expected = floats.to(dtype).view(torch.int16)
        assert torch.equal(rounded.view(torch.int16)[~nan], expected[~nan])

    @pytest.mark.parametrize("name,dtype", [("bfloat16", torch.bfloat16), ("half", torch.float16)])
    def test_mma_is_the_product(self, library, order, name, dtype):
        for _ in range(20):
            a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
            acc = torch.randn(16, 8)
            exact = acc.double() + a.double() @ b.double()
            bound = 17 * torch.finfo(torch.float32).eps * (acc.double().abs() + a.double().abs() @ b.double().abs())
            said = getattr(library, f"multiply_{name}")(pointer(acc), pointer(a), pointer(b))
            assert said.decode() == NO_ERROR and bool(((acc.double() - exact).abs() <= bound).all())


@pytest.mark.exhaustive
@sanitizer("address")
class TestAddressSanitizer:
    def test_a_sound_kernel_passes(self):
        done = run_sanitized("address", "sound")
        assert done.returncode == 0 and done.stdout == f"{NO_ERROR}\n", done.stderr[-3000:]

    @pytest.mark.parametrize(
        "name,message",
        [
            ("past_static_shared", "ERROR: AddressSanitizer: global-buffer-overflow"),
            ("past_dynamic_shared", "ERROR: AddressSanitizer: heap-buffer-overflow"),
            ("past_a_row_of_shared", "runtime error: index 64 out of bounds for type 'float"),
            ("past_global", "ERROR: AddressSanitizer: heap-buffer-overflow"),
            ("misaligned_vector", "runtime error: .* misaligned address"),
        ],
    )
    def test_an_access_one_past_the_end_is_caught(self, name, message):
        done = run_sanitized("address", name)
        assert done.returncode != 0 and re.search(message, done.stderr), done.stdout + done.stderr[-3000:]


@pytest.mark.exhaustive
@sanitizer("thread")
class TestThreadSanitizer:
    def test_a_sound_kernel_passes(self):
        done = run_sanitized("thread", "sound")
        assert done.returncode == 0 and done.stdout == f"{NO_ERROR}\n", done.stderr[-3000:]

    @pytest.mark.parametrize("name", ["missing_syncthreads", "missing_syncwarp", "missing_barrier_before_reuse"])
    def test_a_missing_barrier_is_caught(self, name):
        done = run_sanitized("thread", name)
        assert done.returncode != 0 and "WARNING: ThreadSanitizer: data race" in done.stderr, done.stderr[-3000:]

    def test_a_divergent_barrier_is_caught(self):
        assert "divergent barrier" in run_sanitized("thread", "divergent_barrier").stdout
