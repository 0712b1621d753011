"""pytest bench/ --benchmark-only [--shapes quick|all] [--threads N] [--against FILE] [--benchmark-json FILE]

On two quiet cores --shapes all (the default) takes under six minutes and --shapes quick under one.

Every benchmark times its candidates in turn within each round, prints one table of ratios at the end and fails where
this package is slower than the best naive way, or slower than it was in FILE: rules in interleaved.py. With
--benchmark-disable everything runs and nothing is judged.
"""

import json
from pathlib import Path

import pytest
import torch
from interleaved import Race, table

import rosa_kernels as rk
from rosa_kernels import dispatch

_RACES = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("rosa_kernels benchmarks")
    group.addoption(
        "--shapes", choices=("all", "quick"), default="all", help="quick: only the first shape of each file"
    )
    group.addoption("--threads", type=int, default=2, help="threads of PyTorch and of the kernels (default: 2)")
    group.addoption("--against", type=Path, help="an earlier --benchmark-json file whose ratios must still be reached")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[_RACES] = []


def pytest_generate_tests(metafunc):
    """A test's `shape` runs over what its module lists as SHAPES, or over the first of them for --shapes quick."""
    if "shape" in metafunc.fixturenames:
        shapes = metafunc.module.SHAPES
        if metafunc.config.getoption("--shapes") == "quick":
            shapes = shapes[:1]
        metafunc.parametrize("shape", shapes, ids=str)


def serving_backend(dtype: torch.dtype) -> str:
    """The name of the backend that serves CPU tensors of this dtype now."""
    module = dispatch.backend_for(torch.empty(0, dtype=dtype))
    return next(name for name, candidate in dispatch.BACKENDS.items() if candidate is module)


def _earlier_ratios(path: Path | None) -> dict[str, float]:
    if path is None:
        return {}
    races = json.loads(path.read_text())["benchmarks"]
    return {race["fullname"]: race["extra_info"]["ratio"] for race in races}


@pytest.fixture(scope="session")
def earlier_ratios(request):
    return _earlier_ratios(request.config.getoption("--against"))


@pytest.fixture
def race(request, benchmark, earlier_ratios):
    """race(candidates, dtype, ...) times them in turn, records the result for the closing table, and judges it.

    candidates: {name: function}; "ours" is this package, "frozen" the layer's own GEMMs, any other a naive way.
    """

    def run(candidates, dtype, *, goal=None, allowance=0.0):
        result = Race(request.node.name.removeprefix("test_"), candidates, goal=goal, allowance=allowance)
        result.run(benchmark, seconds=1.5)
        backend = serving_backend(dtype)
        before = earlier_ratios.get(request.node.nodeid)
        unjudged = "reference" if backend == "reference" else "--benchmark-disable" if benchmark.disabled else None
        result.verdict = f"{unjudged}: not judged" if unjudged else result.judge(before)
        benchmark.extra_info.update(result.summary(), backend=backend, threads=torch.get_num_threads())
        request.config.stash[_RACES].append(result)
        if result.verdict.startswith("SLOWER"):
            pytest.fail(f"{result.name}: {result.verdict}\n{table([result])}", pytrace=False)

    return run


def pytest_terminal_summary(terminalreporter, config):
    races = config.stash[_RACES]
    if races:
        terminalreporter.section("time ratios (lower quartile of interleaved rounds)")
        reasons = ", ".join(f"{name}: {reason or 'available'}" for name, reason in rk.available_backends().items())
        terminalreporter.write_line(f"{torch.get_num_threads()} threads, torch {torch.__version__}, backends {reasons}")
        terminalreporter.write_line(table(races))
