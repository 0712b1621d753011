"""The tool that measures a GPU call's host time runs without a GPU, and measures what it says."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import gpu_host_time
from gpu_host.cases import CASES, FEATURES, TinyLayer
from gpu_host.plans import Plan
from paths import REPOSITORY
from rosa_kernels.backends.cuda import heuristics as cuda_heuristics
from rosa_kernels.backends.gpu.cost_model import LinearCall, SDDMMCall
from rosa_kernels.backends.gpu.device_rates import RATES
from rosa_kernels.backends.triton import heuristics as triton_heuristics
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW, UNSTRUCTURED

ON_CUDA, ON_TRITON = "lora by kernels bf16 cuda", "lora H by its kernel bf16 triton"


def case_named(name):
    return next(case for case in CASES if case.name == name)


def dry_run(tmp_path, *names) -> dict[str, dict]:
    """{name of a line: what the file says of it}."""
    file = tmp_path / "host.json"
    only = itertools.chain(*(("--only", name) for name in names))
    command = [sys.executable, "bench/tools/gpu_host_time.py", "--quick", "--json", str(file), *only]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, check=False, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads(file.read_text())["steps"]
    assert all(step["name"] in done.stdout for step in steps)
    return {step["name"]: step for step in steps}


def check(steps: dict[str, dict], name: str, launches: int, aten_calls: int) -> None:
    assert set(steps) == {f"{name}{what}" for what in ("", " forward", " module", " forward module")}
    for step in steps.values():
        assert 0 < step["by_hand_us"] and step["ratio"] == step["ours_us"] / step["by_hand_us"]
        assert gpu_host_time.peft is None or ("module" in step["name"]) == ("peft_us" in step)
    assert (steps[name]["launches"], steps[name]["aten_calls"]) == (launches, aten_calls)


needs_compilers = pytest.mark.skipif(gpu_host_time.missing() is not None, reason=str(gpu_host_time.missing()))


@needs_compilers
@pytest.mark.exhaustive  # compiling the backend takes half a minute
def test_dry_run_of_the_cuda_backend(tmp_path):
    check(dry_run(tmp_path, ON_CUDA), ON_CUDA, launches=3, aten_calls=5)


@pytest.mark.exhaustive
@needs_compilers
def test_dry_run_of_triton(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    check(dry_run(tmp_path, ON_TRITON), ON_TRITON, launches=4, aten_calls=4)


def all_calls():
    """Calls of every kind that decides which algorithms may serve it."""
    for T, structure, element_size, base, known in itertools.product(
        (64, 8192), (None, UNSTRUCTURED, ROW, COLUMN, BLOCK16), (2, 4), (True, False), (True, False)
    ):
        nnz, structure = (0, 0) if structure is None else (167936, structure)
        yield LinearCall(T, FEATURES, FEATURES, 16, nnz, structure, element_size, has_base=base, H_known=known)


def in_places(algorithms) -> set[tuple[int, str]]:
    """The words of linear algorithms, each with its place: base, low_rank or sparse."""
    return {place for algorithm in algorithms for place in enumerate(algorithm)}


@needs_compilers
@pytest.mark.exhaustive
def test_every_algorithm_is_measured(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    steps = dry_run(tmp_path)
    assert {name.split()[0] for name in steps} == {"lora", "rosa", "rows"}
    assert len(steps) == sum((1 + case.has_step) * (1 + case.has_module) for case in CASES)
    for backend, heuristics, rates in (("triton", triton_heuristics, ()), ("cuda", cuda_heuristics, (RATES["sm_90"],))):
        taken = [step["algorithms"] for name, step in steps.items() if backend in name.split()]
        legal = itertools.chain(*(heuristics.linear_algorithms(call, *rates) for call in all_calls()))
        assert in_places(legal) == in_places(
            [part for algorithms in taken for name, part in algorithms.items() if name != "dvalues"]
        )
        kinds = [SDDMMCall(8192, FEATURES, FEATURES, 167936, structure) for structure in (UNSTRUCTURED, ROW, BLOCK16)]
        legal = set(itertools.chain(*map(heuristics.sddmm_algorithms, kinds)))
        assert legal == {algorithms["dvalues"] for algorithms in taken if "dvalues" in algorithms}


def test_a_backend_that_does_not_ask_the_heuristics_is_not_measured():
    plan = Plan(case_named(ON_CUDA))
    plan.decided["y"] = "from elsewhere"
    with pytest.raises(RuntimeError, match=r"were asked for \['y'\], not \['dx', 'y'\]"):
        plan.check_asked()


def test_an_algorithm_that_cannot_serve_its_case_is_refused():
    case = replace(case_named(ON_CUDA), dropout_p=0.1, y=("library", "library", ""))
    with Plan(case).forced(), pytest.raises(ValueError, match="does not serve"):
        cuda_heuristics.choose_linear(
            LinearCall(2, case.out_features, case.in_features, 16, dropout="x"), RATES["sm_90"]
        )


def test_a_hand_written_result_that_is_another_one_is_refused():
    case = case_named(ON_CUDA)
    layer = TinyLayer(case)
    with pytest.raises(RuntimeError, match="by_hand differs by"):
        gpu_host_time.check_results(case, case.name, {"by_hand": lambda: layer.dy}, launches=0)
