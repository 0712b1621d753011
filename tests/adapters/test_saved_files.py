"""Adapters that earlier versions saved load bit for bit; saved/README.md says how the files came about."""

import copy
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import rosa_kernels as rk

SAVED = Path(__file__).parent / "saved"
ADAPTERS = ("lora", "rosa", "rosa_rows", "rosa_columns", "rosa_blocks", "rosa_unselected")
INDICES = ("rows", "columns", "crow_indices", "col_indices")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 12, padding_idx=0)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        return self.head(self.down(torch.tanh(self.up(self.tokens(ids)))).mean(1))


@pytest.fixture
def model():
    model = Model()
    model.load_state_dict(safetensors.torch.load_file(SAVED / "base.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def outputs():
    return safetensors.torch.load_file(SAVED / "outputs.safetensors")


def written_tensors(name):
    return safetensors.torch.load_file(SAVED / name / "adapter_model.safetensors")


def assert_same_bits(got, expected, name):
    assert got.dtype == expected.dtype and got.shape == expected.shape, name
    assert torch.equal(got.detach().view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_written_tensor_is_loaded_bit_for_bit(model, name):
    rk.load_adapters(model, SAVED / name).eval()
    parameters = dict(model.named_parameters())
    for key, expected in written_tensors(name).items():
        layer, _, last = key.rpartition(".")
        if last not in INDICES:
            parameter = parameters.get(f"{key}.default")
            assert_same_bits(parameters[key] if parameter is None else parameter, expected, key)
            continue
        pattern = model.get_submodule(layer).sparse_pattern()
        if last == "rows":
            assert_same_bits(pattern.crow_indices.diff().nonzero()[:, 0].int(), expected, key)
        elif last == "columns":
            assert_same_bits(pattern.col_indices[: len(expected)], expected, key)
        else:
            assert_same_bits(getattr(pattern, last), expected, key)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_outputs_are_those_of_the_saved_model(model, outputs, name):
    rk.load_adapters(model, SAVED / name).eval()
    for backend in ("reference", "auto"):
        with rk.use_backend(backend), torch.no_grad():
            torch.testing.assert_close(model(outputs["ids"]), outputs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ADAPTERS)
def test_saving_again_keeps_the_config_and_every_tensor(model, name, tmp_path):
    rk.load_adapters(model, SAVED / name).eval()
    rk.save_adapters(model, tmp_path)
    config = "adapter_config.json"
    assert (tmp_path / config).read_bytes() == (
        SAVED / name / config
    ).read_bytes()  # its digest is over the tensors too
    again, expected = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"), written_tensors(name)
    assert again.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same_bits(again[key], tensor, key)


@pytest.mark.parametrize("name", ("lora", "rosa"))
def test_a_state_dict_loads_bit_for_bit(model, outputs, name):
    rk.load_adapters(model, SAVED / name).eval()  # for the config; the numbers come from the state dict
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = safetensors.torch.load_file(SAVED / f"{name}.state_dict.safetensors")
    model.load_state_dict(state)
    for key, tensor in model.state_dict().items():
        assert_same_bits(tensor, state[key], key)
    with rk.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(model(outputs["ids"]), outputs[name], rtol=1e-5, atol=1e-6)


def test_a_whole_model_that_torch_saved_names_classes_that_are_still_there(model, tmp_path):
    """0.1.0 pickled the record of add_adapters as rosa_kernels.adapters.AdapterRecord."""
    assert pickle.loads(b"crosa_kernels.adapters\nAdapterRecord\n.") is rk.adapters.AdapterRecord
    rk.add_adapters(model, rk.LoRAConfig(r=2, target_modules=["up"]))
    torch.save(model, tmp_path / "model.pt")
    assert b"rosa_kernels.adapters.inject" not in (tmp_path / "model.pt").read_bytes()


def test_a_wrapped_model_is_filled_in_place_its_saved_modules_too(model, outputs):
    """As DistributedDataParallel wraps it: every name then begins with ``module.``."""
    config = rk.load_adapters(copy.deepcopy(model), SAVED / "lora").rosa_adapters.config
    rk.add_adapters(model, config).eval()
    wrapper = nn.Module()
    wrapper.module = model
    rk.load_adapters(wrapper, SAVED / "lora")
    with rk.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(model(outputs["ids"]), outputs["lora"], rtol=1e-5, atol=1e-6)


def test_a_peft_folder_loads(model, outputs):
    rk.from_peft(SAVED / "peft", model).eval()
    with rk.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(model(outputs["ids"]), outputs["lora"], rtol=1e-5, atol=1e-6)
