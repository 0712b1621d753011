"""Races of this package against hand-written PyTorch. They print one table of time ratios at the end.

    pytest bench/ --benchmark-only                  a selection that shows every op and layer: four minutes on two cores
    pytest bench/ --benchmark-only --shapes all     every shape: 8 to 16 minutes on two cores
    pytest bench/ --benchmark-only --judge          a race fails where this package is slower; the table marks it anyway
    pytest bench/ --benchmark-only -k spmm          one op
    pytest bench/ --benchmark-only --against FILE   compare with the --benchmark-json file of an earlier run as well
    pytest bench/ --benchmark-disable               everything runs once, to see that it runs

Further options: --device auto|cpu|gpu|all, --threads N, --results DIRECTORY (`pytest bench/ --help` explains them).
Where there is a GPU, its races run and those of the CPU do not. The rules of judgement are in tools/interleaved.py.
Every shape of the GPU's races together writes bench/results/<device>-<backend>.json (tools/gpu_results.py).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpu_results
import rosa_kernels as rk
from gpu_timing import MODES, DryRun
from interleaved import Race, earlier_ratios_of, table
from rosa_kernels import dispatch

_CPU_RACES = pytest.StashKey[list[Race]]()
_GPU_RESULTS = pytest.StashKey[list[gpu_results.Result]]()
_GPU_COLLECTED = pytest.StashKey[list[str]]()
_GPU_STARTED = pytest.StashKey[list[str]]()
_SECTIONS = pytest.StashKey[dict[str, Callable[[], str]]]()
_SKIPPED = pytest.StashKey[set[str]]()
_NOT_CAPTURED = (
    "raced eagerly only: cuSPARSE's version decides whether a capture works, and a failed one spoils the process"
)


def pytest_addoption(parser):
    group = parser.getgroup("rosa_kernels benchmarks")
    group.addoption(
        "--device",
        choices=("auto", "cpu", "gpu", "all"),
        default="auto",
        help="whose races run (default: the GPU's where there is a GPU, the CPU's elsewhere)",
    )
    group.addoption(
        "--shapes",
        choices=("selected", "all"),
        default="selected",
        help="which shapes are raced (selected, the default: a few that show every op and layer in minutes)",
    )
    group.addoption(
        "--judge", action="store_true", help="a race fails where this package is slower (without it the table says so)"
    )
    group.addoption("--threads", type=int, default=2, help="threads of PyTorch and of the kernels (default: 2)")
    group.addoption(
        "--against", type=Path, help="an earlier --benchmark-json file: a race is also slower where its ratio has grown"
    )
    group.addoption(
        "--results",
        type=Path,
        default=gpu_results.RESULTS,
        help="where the GPU's figures are written (default: bench/results, which takes runs of all shapes only)",
    )
    group.addoption(
        "--gpu-dry-run",
        action="store_true",
        help="run the GPU's races on the CPU with tiny shapes, to see that the code runs; nothing is judged",
    )


def pytest_configure(config):
    if config.getoption("--judge"):
        for option in ("--benchmark-disable", "--gpu-dry-run"):
            if config.getoption(option):
                raise pytest.UsageError(f"--judge needs times, and {option} measures none")
    config.option.benchmark_quiet = True  # pytest-benchmark's table has ours alone; --benchmark-verbose prints it
    torch.set_num_threads(config.getoption("--threads"))
    for key in (_CPU_RACES, _GPU_RESULTS, _GPU_COLLECTED, _GPU_STARTED):
        config.stash[key] = []
    config.stash[_SECTIONS] = {}
    config.stash[_SKIPPED] = set()


def pytest_generate_tests(metafunc):
    """A test's `shape` runs over its module's SELECTED shapes, or over all of its SHAPES."""
    if "shape" in metafunc.fixturenames:
        module = metafunc.module
        shapes = module.SHAPES if metafunc.config.getoption("--shapes") == "all" else module.SELECTED
        if metafunc.config.getoption("--benchmark-disable"):  # some CPUs take seconds for a bf16 GEMM
            shapes = list(dict.fromkeys(replace(shape, tokens=min(512, shape.tokens)) for shape in shapes))
        metafunc.parametrize("shape", shapes, ids=str)


def pytest_collection_modifyitems(config, items):
    """Skips the races of a device that is not asked for or not there. The summary says which races and why."""
    reasons = {"race": _why_no_cpu_races(config), "gpu_race": _why_no_gpu_races(config)}
    for item in items:
        for fixture, reason in reasons.items():
            if fixture in getattr(item, "fixturenames", ()):
                if fixture == "gpu_race":
                    config.stash[_GPU_COLLECTED].append(item.name)
                if reason:
                    item.add_marker(pytest.mark.skip(reason=reason))
                    config.stash[_SKIPPED].add(reason)


def _why_no_cpu_races(config) -> str | None:
    device = config.getoption("--device")
    if config.getoption("--gpu-dry-run"):
        return "the CPU's races: not part of --gpu-dry-run"
    if device == "gpu" or (device == "auto" and torch.cuda.is_available()):
        return "the CPU's races: the GPU's run; --device cpu or --device all runs these"
    return None


def _why_no_gpu_races(config) -> str | None:
    if config.getoption("--gpu-dry-run"):
        return None
    if config.getoption("--device") == "cpu":
        return "the GPU's races: --device cpu"
    if not torch.cuda.is_available():
        return f"the GPU's races: torch.cuda.is_available() is False (torch {torch.__version__})"
    return None


def serving_backend(device: str, dtype: torch.dtype, x_shape: tuple[int, ...] = (0, 1)) -> str:
    """The name of the backend that serves an x of this dtype and shape on the device now."""
    module = dispatch.backend_for(torch.empty(1, dtype=dtype, device=device).expand(x_shape))
    return next(name for name, candidate in dispatch.BACKENDS.items() if candidate is module)


@pytest.fixture(scope="session")
def earlier_ratios(request):
    return earlier_ratios_of(request.config.getoption("--against"))


@pytest.fixture
def run_and_judge(request, benchmark, earlier_ratios):
    """run_and_judge(race, ...) sets race.verdict, and returns the backend that served ours."""

    def run(race, device, dtype, seconds, x_shape=(0, 1)):
        race.run(benchmark, seconds)
        backend = serving_backend(device, dtype, x_shape)
        before = earlier_ratios.get(request.node.name)
        unjudged = _why_unjudged(request.config, backend)
        race.verdict = f"{unjudged}: not judged" if unjudged else race.judge(before)
        benchmark.extra_info.update(race.summary(), backend=backend, threads=torch.get_num_threads())
        return backend

    return run


def _why_unjudged(config, backend: str) -> str | None:
    if config.getoption("--gpu-dry-run"):
        return "dry run"
    if config.getoption("--benchmark-disable"):
        return "--benchmark-disable"
    return backend if backend == "reference" else None


def _fail_if_judged(race: Race, config) -> None:
    if race.is_slower and config.getoption("--judge"):
        pytest.fail(f"{race.name}: {race.verdict}\n{table([race])}", pytrace=False)


@pytest.fixture
def race(request, run_and_judge):
    """race(candidates, dtype, ...) times the candidates in turn and records the result for the table at the end.

    candidates is {name: function}. "ours" is this package, and "frozen" is the frozen layer's own GEMMs. Ours is
    compared with all the others.
    """

    def run(candidates, dtype, *, allowance=0.0, seconds=1.5):
        result = Race(request.node.name.removeprefix("test_"), candidates, allowance=allowance)
        run_and_judge(result, "cpu", dtype, seconds=seconds)
        request.config.stash[_CPU_RACES].append(result)
        _fail_if_judged(result, request.config)

    return run


@pytest.fixture
def gpu_race(request, run_and_judge):
    """gpu_race(candidates, ...) does the same for the test's case, on its device and in its mode."""
    case = request.node.callspec.params["case"]
    request.config.stash[_GPU_STARTED].append(request.node.name)

    def run(candidates, *, allowance=0.0, unjudged=()):
        timer = MODES[case.mode]() if case.device == "cuda" else DryRun()
        candidates, left_out = _without_csr_where_it_fails(candidates, case.mode)
        candidates = {name: timer.prepare(function) for name, function in candidates.items()}
        operation = request.node.originalname.removeprefix("test_gpu_")
        result = Race(f"{operation}[{case}]", candidates, allowance=allowance, unjudged=unjudged, timer=timer)
        x_shape = case.shape.tokens, case.shape.in_features
        backend = run_and_judge(result, case.device, case.layer_dtype, timer.race_seconds, x_shape)
        request.config.stash[_GPU_RESULTS].append(
            gpu_results.Result(operation, case, result, backend, timer.l2, left_out)
        )
        _fail_if_judged(result, request.config)

    return run


def _without_csr_where_it_fails(candidates: dict, mode: str) -> tuple[dict, dict[str, str]]:
    """Returns the candidates that run, and {"csr": why it does not run}.

    Only a call tells which dtypes torch.sparse lacks.
    """
    reason = None
    if "csr" in candidates and mode == "graphed":
        reason = _NOT_CAPTURED
    elif "csr" in candidates:
        try:
            candidates["csr"]()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    if reason is None:
        return candidates, {}
    return {name: function for name, function in candidates.items() if name != "csr"}, {"csr": reason}


@pytest.fixture(scope="session")
def closing_sections(request):
    """A dictionary {title: function}. When the session ends, each function's text is printed under its title."""
    return request.config.stash[_SECTIONS]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def pytest_terminal_summary(terminalreporter, config):
    for title, text in config.stash[_SECTIONS].items():
        terminalreporter.section(title)
        terminalreporter.write_line(text())
    title = "time ratios (lower quartile of interleaved rounds)"
    cpu_races = config.stash[_CPU_RACES]
    if cpu_races:
        terminalreporter.section(title)
        reasons = ", ".join(f"{name}: {reason or 'available'}" for name, reason in rk.available_backends().items())
        terminalreporter.write_line(f"{torch.get_num_threads()} threads, torch {torch.__version__}, backends {reasons}")
        terminalreporter.write_line(table(cpu_races))
    if config.stash[_GPU_STARTED]:
        terminalreporter.section(f"GPU {title}")
        terminalreporter.write_line(_gpu_summary(config))
    raced = [*cpu_races, *(result.race for result in config.stash[_GPU_RESULTS])]
    if slower := [race.name for race in raced if race.is_slower]:
        fate = "failed" if config.getoption("--judge") else "not failed without --judge"
        terminalreporter.write_line(f"slower in {len(slower)} of {len(raced)} races ({fate}): {', '.join(slower)}")
    for reason in sorted(config.stash[_SKIPPED]):
        terminalreporter.write_line(f"skipped, {reason}")


def _gpu_summary(config) -> str:
    """The races as a table, and where their figures went."""
    results, dry_run = config.stash[_GPU_RESULTS], config.getoption("--gpu-dry-run")
    finished = {f"test_gpu_{result.race.name}" for result in results}
    did_not_finish = [name for name in config.stash[_GPU_STARTED] if name not in finished]
    partial = _why_partial(config)
    report = gpu_results.report(results, did_not_finish, partial, dry_run)
    lines = [f"{report['device']}, torch {report['torch']}, triton {report['triton']}, commit {report['commit']}"]
    if results:
        lines += [
            table([result.race for result in results]),
            "* its result differs from ours: it is shown and not judged",
        ]
    lines += sorted({f"{name} left out, {why}" for result in results for name, why in result.left_out.items()})
    lines += [f"did not finish: {name}" for name in did_not_finish]
    lines.append(gpu_results.keep(config.getoption("--results"), report))
    return "\n".join(lines)


def _why_partial(config) -> str | None:
    if config.getoption("--shapes") == "selected":
        return "selected shapes only, not --shapes all"
    if config.getoption("--benchmark-disable"):
        return "--benchmark-disable: nothing was timed"
    if not config.stash[_GPU_RESULTS]:
        return "no race finished"
    started, collected = len(config.stash[_GPU_STARTED]), len(config.stash[_GPU_COLLECTED])
    named = any("::" in str(argument) for argument in config.args)
    return f"{started} of {collected} collected races started" if named or started < collected else None
