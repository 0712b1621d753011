"""Direct launches of compiled kernels: what Triton's own launch would have called, with the same arguments.

No GPU: a driver that stands for one compiles for sm_90, and each launch is written down in place of being made.
"""

import contextlib
import importlib
import itertools
import operator
import os
from typing import NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rosa_kernels.__main__ import main
from rosa_kernels.backends import triton as backend
from rosa_kernels.backends.triton import compiled_call, launcher, linear, split_k, transpose
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.heuristics import LinearAlgorithm
from rosa_kernels.backends.triton.operands import LinearProblem

BF16, FP32 = torch.bfloat16, torch.float32
BLOCKS = Config({"BLOCK_T": 64, "BLOCK_F": 64}, num_warps=4, num_stages=1)
KERNELS = transpose.transpose_kernel, split_k.sum_kernel, linear.linear_kernel


class Driver:
    """As much of a CUDA driver as a launch asks for. stream is the current one."""

    stream = 0

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Launch(NamedTuple):
    """What the C launcher got."""

    compiled: CompiledKernel
    grid: tuple
    stream: int
    hooks: tuple
    arguments: tuple

    @property
    def addresses(self) -> tuple:
        """The arguments, with its address for a tensor; a tensor that is None has none."""
        at = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self.arguments)
        return tuple(a or 0 for a in at)


class WritesDown(CudaLauncher):
    """Triton's launcher object, whose C function writes the launch down."""

    scratch = 0

    def __init__(self, compiled, made):
        self.gsan_enabled, self.num_ctas, self.arg_annotations, self.kernel_signature = (
            False,
            1,
            ["annotated"],
            b"types",
        )
        self.global_scratch_size, self.profile_scratch_size = self.scratch, 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.launch_cooperative_grid = self.launch_pdl = False

        def launch(x, y, z, stream, function, cooperative, pdl, packed, metadata, enter, leave, *scratch_and_types):
            assert scratch_and_types[1:4] == (None, ["annotated"], b"types") and packed is compiled.packed_metadata
            made.append(Launch(compiled, (x, y, z), stream, (enter, leave), scratch_and_types[4]))

        self.launch = launch


class Launches(list):
    """In their order. slow counts those that were Triton's own."""

    slow = 0
    driver: Driver


@pytest.fixture
def launches(monkeypatch):
    made, objects, run = Launches(), {}, JITFunction.run

    def object_of(compiled):
        return objects.setdefault(id(compiled), WritesDown(compiled, made))

    def counted(self, *args, **keywords):
        made.slow += 1
        return run(self, *args, **keywords)

    before = driver._active
    made.driver = Driver()
    driver.set_active(made.driver)
    monkeypatch.setattr(CompiledKernel, "run", property(object_of))
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda self: None)
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(launcher, "_calls", {})
    monkeypatch.setattr(launcher, "_current_device", lambda: -1)  # that of a CPU tensor
    compiled_call._backend.cache_clear()
    for kernel in KERNELS:
        kernel.device_caches.clear()
    yield made
    for kernel in KERNELS:
        kernel.device_caches.clear()
    compiled_call._backend.cache_clear()
    driver._active = before


def launch_transpose(x, T=None, config=BLOCKS):
    features = x.shape[1]
    out = torch.empty(features, 128, dtype=x.dtype)
    grid = (2 * -(-features // 64),)
    launcher.launch(transpose.transpose_kernel, grid, (out, x), (T or len(x), 128, features, *x.stride()), (), config)


CALLS = {  # each of another kind for Triton, but for two
    "aligned": lambda: launch_transpose(torch.zeros(80, 64, dtype=BF16)),
    "the same at another place": lambda: launch_transpose(torch.ones(80, 64, dtype=BF16)),
    "more tokens": lambda: launch_transpose(torch.zeros(81, 64, dtype=BF16)),
    "more tokens than an int32": lambda: launch_transpose(torch.zeros(80, 64, dtype=BF16), T=2**31),
    "not at 16 bytes": lambda: launch_transpose(torch.zeros(80 * 64 + 1, dtype=BF16)[1:].view(80, 64)),
    "odd features": lambda: launch_transpose(torch.zeros(80, 63, dtype=BF16)),
    "one feature": lambda: launch_transpose(torch.zeros(80, 1, dtype=BF16)),
    "fp32": lambda: launch_transpose(torch.zeros(80, 64)),
    "transposed": lambda: launch_transpose(torch.zeros(64, 80, dtype=BF16).T),
    "other blocks": lambda: launch_transpose(torch.zeros(80, 64, dtype=BF16), config=BLOCKS.with_blocks(BLOCK_F=32)),
    "more warps": lambda: launch_transpose(torch.zeros(80, 64, dtype=BF16), config=Config(BLOCKS.blocks, 8, 1)),
}
SAME_KIND = {"aligned", "the same at another place", "more tokens"}


def comparable(launch):
    """Without addresses, which every call has its own of."""
    return launch.compiled, launch.grid, launch.stream, launch.arguments[2:]


def test_direct_launches_are_those_that_triton_would_make(launches):
    for call in CALLS.values():
        launcher._calls.clear()
        call()
    by_triton = list(map(comparable, launches))
    assert launches.slow == len(CALLS)
    for call in CALLS.values():
        call()
    launches.clear()
    launches.slow = 0
    for call in CALLS.values():
        call()
    assert launches.slow == 0
    assert list(map(comparable, launches)) == by_triton


def test_each_kind_has_its_own_kernel(launches):
    for call in CALLS.values():
        call()
    kinds = len(CALLS) - len(SAME_KIND) + 1
    assert launches.slow == kinds
    assert len({id(launch.compiled) for launch in launches}) == kinds
    assert len({id(launch.compiled) for name, launch in zip(CALLS, launches) if name in SAME_KIND}) == 1


def test_a_direct_launch_takes_the_tensors_and_the_stream_of_its_call(launches):
    tensors = [torch.zeros(80, 64, dtype=BF16) for _ in range(3)]
    for stream, x in enumerate(tensors):
        launches.driver.stream = stream
        launch_transpose(x)
    assert [launch.addresses[1] for launch in launches] == [x.data_ptr() for x in tensors]
    assert [launch.stream for launch in launches] == [0, 1, 2]
    assert launches.slow == 1


def test_a_launch_is_made_on_the_device_of_its_tensors(launches, monkeypatch):
    current, entered = [5], []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(launcher, "_current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    for _ in range(2):
        launch_transpose(torch.zeros(80, 64, dtype=BF16))
    assert entered == [-1, -1] and current == [5] and len(launches) == 2


def test_a_direct_launch_is_the_c_function_itself(launches):
    """Where Triton calls it otherwise, launches still work and are slower: then compiled_call.py has to learn that."""
    launch_transpose(torch.zeros(80, 64, dtype=BF16))
    launch_transpose(torch.zeros(80, 64, dtype=BF16))
    call, *_ = launcher._calls.values()
    assert call.launch is launches[0].compiled.run.launch
    assert launches[1].hooks == (None, None)


def multiply(T, weight):
    linear.run_kernel(LinearProblem(torch.zeros(T, 64, dtype=BF16), 32, weight), LinearAlgorithm("kernel"), None)


@pytest.mark.parametrize(
    "call, most",
    [
        (lambda T: transpose.transpose(torch.zeros(T, 64, dtype=BF16)), 1),
        (lambda T: split_k.add_parts(torch.zeros(T, 8), torch.zeros(2, T, 8)), 2),  # 16 divides the size, or not
        (lambda T: multiply(T, torch.zeros(32, 64, dtype=BF16)), 2),  # for few tokens there are other blocks
    ],
    ids=["transpose", "sum", "linear"],
)
def test_500_token_counts_make_a_handful_of_slow_launches(launches, monkeypatch, call, most):
    for T in range(1, 501):
        call(T)
    assert len(launches) == 500
    assert launches.slow == len({id(launch.compiled) for launch in launches}) == most
    monkeypatch.setattr(compiled_call, "specialised", None)  # a launch of known numbers asks for nothing
    call(499)
    assert len(launches) == 501


NUMBERS = (
    0,
    1,
    2,
    8,
    15,
    16,
    17,
    32,
    48,
    -1,
    -16,
    2**31 - 1,
    2**31 - 16,
    2**31,
    2**31 + 1,
    -(2**31),
    2**40,
    0.5,
    1.0,
    16.0,
)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_numbers_of_one_kind_are_compiled_into_one_kernel(launches, kernel):
    """The kind of a launch is held against the function by which Triton itself finds a kernel."""
    *_, binder = kernel.device_caches[0]
    for place, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            continue
        of_triton, ours = {}, {}
        for number in NUMBERS:
            if parameter.do_not_specialize and (type(number) is float or number < 0):
                continue  # these are counts
            arguments = [number if other == place else 3 for other in range(len(kernel.params))]
            _, specialization, _ = binder(*arguments)
            of_triton[number, type(number)] = specialization[place]
            wide = number > launcher._LARGEST_INT32
            ours[number, type(number)] = wide if parameter.do_not_specialize else compiled_call.specialised(number)
        for first, second in itertools.combinations(ours, 2):
            assert (ours[first] == ours[second]) == (of_triton[first] == of_triton[second]), (
                parameter.name,
                first,
                second,
            )


def test_kinds_are_forgotten_before_they_fill_memory(launches, monkeypatch):
    monkeypatch.setattr(launcher, "_MOST_KINDS", 3)
    for features in range(60, 70):
        launch_transpose(torch.zeros(64, features, dtype=BF16))
        assert len(launcher._calls) <= 3
    assert len(launches) == 10


def test_what_is_no_number_is_refused(launches, monkeypatch):
    monkeypatch.setattr(launcher, "_layouts", {})
    for numbers, name in (
        ((2.0, 128, 64, 64, 1), "T"),
        ((True, 128, 64, 64, 1), "T"),
        ((2, None, 64, 64, 1), "padded"),
    ):
        x = torch.zeros(2, 64)
        with pytest.raises(TypeError, match=f"transpose_kernel: {name}: expected a number"):
            launcher.launch(transpose.transpose_kernel, (1,), (x, x), numbers, (), BLOCKS)


def test_hooks_are_called(launches):
    """A profiler's hooks come and go at any time."""
    x, seen = torch.zeros(80, 64, dtype=BF16), []
    launch_transpose(x)
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hooks.add(seen.append)
        try:
            launch_transpose(x)
        finally:
            hooks.remove(seen.append)
        launch_transpose(x)
        with_hook, without = launches[-2:]
        assert hooks in with_hook.hooks and without.hooks == (None, None)
        assert comparable(with_hook) == comparable(without) and with_hook.addresses[1] == x.data_ptr()


class TestWhereTritonLaunchesOtherwise:
    """Its launcher object is called, which does what it always does."""

    @staticmethod
    def check(launches, last):
        x = torch.zeros(80, 64, dtype=BF16)
        for _ in range(2):
            launch_transpose(x)
        slow, direct = launches
        call, *_ = launcher._calls.values()
        assert launches.slow == 1 and call.middle == ()
        assert direct.addresses[1] == x.data_ptr() and direct.grid == slow.grid and len(direct.arguments) == last

    def test_with_scratch_memory(self, launches, monkeypatch):
        monkeypatch.setattr(WritesDown, "scratch", 8)
        monkeypatch.setattr(
            "triton.runtime._allocation._allocator", type("A", (), {"get": lambda self: lambda *a: None})()
        )
        self.check(launches, 9)

    def test_with_more_arguments(self, launches, monkeypatch):
        call = CudaLauncher.__call__
        monkeypatch.setattr(WritesDown, "__call__", lambda self, *args: call(self, *args, "more"), raising=False)
        self.check(launches, 10)


@contextlib.contextmanager
def a_triton_without(name):
    """compiled_call as it is where Triton has lost this name before the import."""
    owner, _, attribute = name.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(holder := operator.attrgetter(owner)(triton), type(knobs.runtime)):
            patch.delattr(type(holder), attribute)
        else:
            patch.delattr(holder, attribute)
        importlib.reload(compiled_call)
    try:
        yield
    finally:
        importlib.reload(compiled_call)


@pytest.mark.parametrize("name", compiled_call.PRIVATE_NAMES)
class TestWithoutAPrivateName:
    def test_every_launch_is_tritons(self, launches, name):
        with a_triton_without(name):
            assert compiled_call.missing_names == (name,)
            for call in CALLS.values():
                call()
                call()
        assert launches.slow == len(launches) == 2 * len(CALLS)

    def test_the_command_says_so(self, name, monkeypatch, capsys):
        monkeypatch.setattr(backend, "unavailable_reason", lambda: None)
        monkeypatch.setattr("rosa_kernels.dispatch.automatic_choice", lambda device, dtype, host_bound=False: "triton")
        with a_triton_without(name):
            main()
        assert f"this Triton has no triton.{name}\n" in capsys.readouterr().out
        main()
        assert "this Triton has no" not in capsys.readouterr().out
