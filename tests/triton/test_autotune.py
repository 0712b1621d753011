"""python -m rosa_kernels.tune without a GPU: what it would write, and that the backend then goes by it."""

import os
import subprocess
import sys

import pytest
import torch

from rosa_kernels import tune
from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.device_rates import Rates

CPU = torch.device("cpu")


@pytest.fixture
def table_of_the_cpu():
    """use_table for the interpreter's device, undone."""
    yield lambda table: device_rates.use_table(CPU, table)
    device_rates.use_table(CPU, {"rates": {}, "configs": {}})


def test_a_table_survives_the_file(tmp_path):
    table = {"rates": {"bandwidth": 1e12}, "configs": {"linear/2/4": "BLOCK_M=64"}, "device": "some GPU"}
    path = tmp_path / "deep" / "gpu.json"
    device_rates.write_table(path, table)
    assert device_rates.read_table(path) == table
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"rates": {}}', '{"rates": {"speed": 1}, "configs": {}}',
     '{"rates": {"bandwidth": -1}, "configs": {}}',
     '{"rates": {"bandwidth": "fast"}, "configs": {}}', '{"rates": {}, "configs": {"linear/2/4": 1}}',
     '{"rates": {}, "configs": {"linear/2/4": null}}'],
)  # fmt: skip
def test_a_file_that_is_no_table_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="gpu.json.*delete it"):
        device_rates.read_table(path)


def test_the_file_is_named_after_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ROSA_KERNELS_TUNED", str(tmp_path))
    assert device_rates.table_file("NVIDIA H100 80GB HBM3") == tmp_path / "nvidia-h100-80gb-hbm3.json"


def test_a_measured_rate_replaces_the_data_sheets(table_of_the_cpu):
    table_of_the_cpu({"rates": {"bandwidth": 7.0}, "configs": {}})
    assert device_rates.rates(CPU, "sm_90") == device_rates.RATES["sm_90"]._replace(bandwidth=7.0)


def test_a_tuned_configuration_is_chosen_while_it_is_listed(table_of_the_cpu):
    configs = pytest.importorskip("rosa_kernels.backends.triton.configs", reason="Triton is not installed")
    first, second = configs.configs("linear", "sm_90", 2, 4)[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "architecture", lambda device: "sm_90")
        for label, chosen in ((second.label, second), (first.label, first), ("BLOCK_M=3", first)):
            table_of_the_cpu({"rates": {}, "configs": {"linear/2/4": label}})
            assert configs.choose("linear", CPU, torch.bfloat16, 4096) is chosen
            assert configs.choose("linear", CPU, torch.bfloat16, 64) is not second


def test_tune_says_so_where_there_is_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(SystemExit, match="1"):
        tune.main([])
    assert "there is none here" in capsys.readouterr().err


def test_tune_says_so_where_triton_is_not_installed():
    code = "import sys; sys.modules['triton'] = None; from rosa_kernels import tune; tune.main([])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("tune measures the Triton kernels: Triton is not installed")


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs where TRITON_INTERPRET=1: test_interpreter.py starts it",
)
class TestMeasure:
    """On the interpreter, with a clock of our own."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        from rosa_kernels.backends.triton import autotune

        monkeypatch.setattr(autotune, "TOKENS", (3, 17, 40))

    def test_rates(self, table_of_the_cpu):
        from rosa_kernels.backends.triton import autotune

        calls = []
        rates = autotune.Measure(CPU, lambda call: (calls.append(call()), 0.5)[1], features=48).rates()
        assert set(Rates._fields) - set(rates) == {"kernel_launch_seconds", "shared_memory"} and all(
            rate > 0 for rate in rates.values()
        )
        assert rates["kernel_efficiency"] == 1.0 and rates["flops_16_bit"] == 2 * 40 * 48 * 48 / 0.5
        torch.testing.assert_close(calls[0], calls[1], rtol=2e-2, atol=2e-1)  # the library's GEMM and ours

    def test_configs_takes_the_fastest_of_each_list(self, monkeypatch, table_of_the_cpu):
        from rosa_kernels.backends.triton import autotune, configs, launcher

        monkeypatch.setattr(hardware, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(launcher, "launch", lambda *args, **keywords: None)
        calls = iter(range(10**6))

        def seconds(call):
            call()
            return 0.9 ** next(calls)  # each call faster than the one before

        chosen = autotune.Measure(CPU, seconds, features=32).configs()
        assert len(chosen) == 5 * 2 * 3
        for key, label in chosen.items():
            kernel, element_size, bucket = key.split("/")
            assert label == configs.configs(kernel, "sm_90", int(element_size), int(bucket))[-1].label
