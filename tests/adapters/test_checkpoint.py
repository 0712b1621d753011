"""save_adapters and load_adapters: identical outputs, small files, and no damage that goes unnoticed."""

import copy
import json
import os

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import rosa_kernels as rk
from rosa_kernels.adapters import safetensors_io
from small_layers import randomise

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
WIDTH = 32


class Net(nn.Module):
    def __init__(self, width=WIDTH, dtype=torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(50, width, padding_idx=0)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)
        self.to(dtype)

    def forward(self, ids):
        return self.head(self.norm(self.second(self.first(self.embedding(ids)).tanh()).mean(1)))


IDS = torch.arange(1, 41).view(4, 10)


def base(**fields):
    torch.manual_seed(1)
    return Net(**fields)


CONFIGS = {
    "lora": rk.LoRAConfig(r=2, use_rslora=True, modules_to_save=["head"]),
    "rosa": rk.RoSAConfig(r=2, density=0.05, mask="random", modules_to_save=["head", "norm"]),
    "sparse": rk.RoSAConfig(r=0, density=0.05, mask="random", target_modules=["first", "second"]),
    "row": rk.RoSAConfig(r=0, density=0.1, mask="random", structure="row", target_modules=["embedding", "first"]),
    "column": rk.RoSAConfig(r=2, density=0.1, mask="random", structure="column", target_modules=["first"]),
    "block": rk.RoSAConfig(r=2, density=0.1, mask="random", structure="block", target_modules=["first"]),
    "global": rk.RoSAConfig(
        r=2, density=0.1, mask="magnitude", mask_scope="global", target_modules=["first", "second"]
    ),
    "patterns": rk.RoSAConfig(
        r=2, density=0.1, mask="random", target_modules=["first", "second"],
        rank_pattern={"second": 5, ".*": 3}, alpha_pattern={"first": 3}, density_pattern={"second": 0},
    ),
}  # fmt: skip


def adapted(name="rosa", select=True, model=None):
    """A model with adapters that hold numbers as training would leave them."""
    model = rk.add_adapters(model or base(), CONFIGS[name])
    if select and isinstance(CONFIGS[name], rk.RoSAConfig):
        rk.select_masks(model)
    return randomise(model).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_is_the_saved_one(backend, name, tmp_path):
    model = adapted(name)
    rk.save_adapters(model, tmp_path / "new" / "folder")
    loaded = rk.load_adapters(base(), tmp_path / "new" / "folder").eval()
    assert torch.equal(loaded(IDS), model(IDS))
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in expected)
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (loaded, model)]
    assert flags[0] == flags[1]
    structures = [
        [layer.sparse_pattern().structure for layer in m.modules() if getattr(layer, "masks_selected", False)]
        for m in (loaded, model)
    ]
    assert structures[0] == structures[1]


def test_the_same_adapters_give_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        torch.manual_seed(3)
        rk.save_adapters(adapted(), tmp_path / folder)
    rk.save_adapters(rk.load_adapters(base(), tmp_path / "a"), tmp_path / "c")
    for file in (CONFIG, MODEL):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()


@pytest.mark.parametrize("name, bytes_an_entry", [("sparse", 8), ("row", 4), ("column", 4)])
def test_files_hold_indices_and_values_and_no_more(name, bytes_an_entry, tmp_path):
    model = adapted(name, model=base(width=256))
    rk.save_adapters(model, tmp_path)
    layers = [layer for layer in model.modules() if isinstance(layer, rk.nn.AdapterLayer)]
    entries = sum(layer.sparse_values.numel() for layer in layers)
    low_rank = sum(p.numel() for layer in layers for p in layer.low_rank_factors() or ())
    rows = sum(layer.weight_shape[0] + 1 for layer in layers)
    limit = bytes_an_entry * entries + 4 * (low_rank + rows) + 2500
    assert os.path.getsize(tmp_path / MODEL) <= limit
    rk.save_adapters(rk.load_adapters(base(width=256), tmp_path), tmp_path)
    assert os.path.getsize(tmp_path / MODEL) <= limit


def test_masks_not_chosen_stay_so(tmp_path):
    model = adapted(select=False)
    rk.save_adapters(model, tmp_path)
    loaded = rk.load_adapters(base(), tmp_path).eval()
    assert torch.equal(loaded(IDS), model(IDS)) and not loaded.first.masks_selected
    assert list(rk.select_masks(loaded)) == ["first", "second"]
    rk.load_adapters(loaded, tmp_path)
    assert not loaded.first.masks_selected and loaded.first.sparse_values.eq(0).all()


def test_dtypes_survive(tmp_path):
    model = adapted(model=base(dtype=torch.bfloat16))
    model.first.half()
    rk.save_adapters(model, tmp_path)
    loaded = rk.load_adapters(base(dtype=torch.bfloat16), tmp_path)
    assert loaded.first.sparse_values.dtype == torch.float16 and loaded.second.sparse_values.dtype == torch.float32
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(loaded.get_parameter(key), parameter)


def test_resuming_fills_the_same_parameters(tmp_path):
    model = adapted()
    rk.save_adapters(model, tmp_path)
    other = adapted()
    held = dict(other.named_parameters())
    randomise(other)
    rk.load_adapters(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))
    assert all(parameter is held[name] for name, parameter in other.named_parameters())
    rk.merge_adapters(other)
    with pytest.raises(ValueError, match="merged"):
        rk.load_adapters(other, tmp_path)


def test_saving_while_merged_or_wrapped(tmp_path):
    model = adapted()
    rk.save_adapters(model, tmp_path / "plain")
    rk.merge_adapters(model)
    rk.save_adapters(nn.Sequential(model), tmp_path / "merged")
    assert (tmp_path / "plain" / MODEL).read_bytes() == (tmp_path / "merged" / MODEL).read_bytes()
    with pytest.raises(ValueError, match="no adapters"):
        rk.save_adapters(base(), tmp_path)


# Models that do not fit


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda m: setattr(m, "first", nn.Linear(WIDTH, 48)), r"first: crow_indices: expected .* 49 entries, got 65"),
        (lambda m: setattr(m, "second", nn.Linear(48, WIDTH)), r"second"),
        (lambda m: setattr(m, "head", nn.Linear(WIDTH, 4)), r"head.weight: expected shape \(4, 32\).*\(3, 32\)"),
        (lambda m: setattr(m, "extra", nn.Linear(2, 2)), "extra"),
        (lambda m: delattr(m, "second"), "second"),
        (lambda m: delattr(m, "head"), "head"),
        (lambda m: m.head.double(), "head.weight: expected torch.float64"),
        (lambda m: rk.add_adapters(m, rk.LoRAConfig(r=7)), "carries adapter"),
    ],
)
def test_a_model_that_does_not_fit_is_named_and_left_alone(change, text, tmp_path):
    rk.save_adapters(adapted(), tmp_path)
    model = base()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        rk.load_adapters(model, tmp_path)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert not hasattr(model, "rosa_adapters") or model.rosa_adapters.config.r == 7


# Damage


@pytest.fixture
def saved(tmp_path):
    rk.save_adapters(adapted(), tmp_path)
    return tmp_path


def refused(folder, text=None):
    model = base()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=text):
        rk.load_adapters(model, folder)
    assert list(model.state_dict()) == before


def rewrite_config(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def rewrite_model(folder, change=lambda tensors: None, change_metadata=lambda metadata: metadata):
    tensors = safetensors.torch.load_file(folder / MODEL)
    with safetensors.safe_open(folder / MODEL, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    safetensors.torch.save_file(tensors, folder / MODEL, change_metadata(metadata))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files(saved, share):
    content = (saved / MODEL).read_bytes()
    (saved / MODEL).write_bytes(content[: int(share * len(content))])
    refused(saved, MODEL)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"{}", b"[" * 10**5, b'{"format": "rosa_kernels 2"}']
)
def test_a_damaged_config(saved, content):
    (saved / CONFIG).write_bytes(content)
    refused(saved, CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("digest"),
        lambda c: c.pop("config"),
        lambda c: c.update(adapter_name=3),
        lambda c: c["patterns"].update(first=["csr"]),
        lambda c: c["config"].pop("r"),
        lambda c: c["config"].update(r="two"),
        lambda c: c["config"].update(density=7),
        lambda c: c["config"].update(lora_alpha=float("nan")),
        lambda c: c["config"].update(surprise=1),
        lambda c: c["config"].update(adapter_type="DoRAConfig"),
        lambda c: c["config"].update(r=3),
    ],
)
def test_a_config_with_wrong_fields(saved, change):
    rewrite_config(saved, change)
    refused(saved)


def test_editing_the_config_takes_effect(saved):
    expected = rk.load_adapters(base(), saved).eval()
    for layer in (expected.first, expected.second):
        layer.scaling *= 2
    rewrite_config(saved, lambda config: config["config"].update(lora_alpha=32))
    assert torch.equal(rk.load_adapters(base(), saved).eval()(IDS), expected(IDS))


@pytest.mark.parametrize("key", ["lora_A", "values", "crow_indices", "col_indices"])
def test_a_missing_tensor(saved, key):
    rewrite_model(saved, lambda tensors: tensors.pop(f"first.{key}"))
    refused(saved, rf"first\.{key}")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t["first.col_indices"].__setitem__(-1, WIDTH), "first: col_indices: expected values in"),
        (lambda t: t["first.col_indices"].__setitem__(0, -1), "first: col_indices"),
        (lambda t: t["first.crow_indices"].__setitem__(-1, 10**6), "first: crow_indices"),
        (lambda t: t.update({"first.col_indices": t["first.col_indices"].float()}), "first: col_indices"),
        (lambda t: t.update({"first.values": t["first.values"][:-1].clone()}), "first.values: expected shape"),
        (lambda t: t.update({"first.values": t["first.values"].int()}), "first.values: expected one of"),
        (lambda t: t.update({"first.lora_A": t["first.lora_A"].T.contiguous()}), "first.lora_A: expected shape"),
        (lambda t: t.update({"first.lora_B": t["first.lora_B"].to(torch.float8_e4m3fn)}), "first.lora_B: expected one"),
        (lambda t: t["first.values"].__setitem__(0, 5.0), "digest"),
        (lambda t: t.update({"first.lora_B": t["first.lora_B"].to(torch.bfloat16)}), "digest"),
    ],
)
def test_tensors_that_are_wrong(saved, change, text):
    rewrite_model(saved, change)
    refused(saved, text)


def test_rows_that_are_wrong(tmp_path):
    rk.save_adapters(adapted("row"), tmp_path)
    rewrite_model(tmp_path, lambda tensors: tensors["embedding.rows"].__setitem__(0, 50))
    refused(tmp_path, "embedding: rows: expected indices in")


def test_a_file_without_metadata(saved):
    rewrite_model(saved, change_metadata=lambda metadata: None)
    refused(saved, "metadata")


@pytest.mark.parametrize("file", [CONFIG, MODEL])
@pytest.mark.parametrize(
    "found, text",
    [
        ("rosa_kernels 2", r"was written by a newer rosa_kernels, in format 'rosa_kernels 2'.*upgrade"),
        ("rosa_kernels 10", r"was written by a newer rosa_kernels, in format 'rosa_kernels 10'.*upgrade"),
        ("rosa_kernels 0", r"expected format 'rosa_kernels 1', got 'rosa_kernels 0'"),
        ("rosa_kernels 2 beta", r"expected format 'rosa_kernels 1', got 'rosa_kernels 2 beta'"),
        ("safetensors", r"expected format 'rosa_kernels 1', got 'safetensors'"),
        (2, r"expected format 'rosa_kernels 1', got 2"),
        (None, r"expected format 'rosa_kernels 1', got None"),
    ],
)
def test_files_of_another_format(saved, file, found, text):
    def with_format(metadata):
        return {key: json.dumps(json.loads(value) | {"format": found}) for key, value in metadata.items()}

    if file == CONFIG:
        rewrite_config(saved, lambda config: config.update(format=found))
    else:
        rewrite_model(saved, change_metadata=with_format)
    refused(saved, rf"{file}: {text}")


def test_missing_files(saved, tmp_path_factory):
    for file in (CONFIG, MODEL):
        empty = tmp_path_factory.mktemp("partial")
        (empty / file).write_bytes((saved / file).read_bytes())
        with pytest.raises(FileNotFoundError):
            rk.load_adapters(base(), empty)


# A save that is killed


@pytest.mark.parametrize("step", range(5))
def test_a_killed_save_leaves_a_usable_pair(tmp_path, monkeypatch, step):
    """Stopped before any of its writes and renames, a save leaves the old adapter or the new one."""
    old, new = adapted("lora"), adapted("rosa")
    rk.save_adapters(old, tmp_path)
    calls = {"left": step}

    def interrupting(function):
        def call(*args):
            if calls["left"] == 0:
                raise KeyboardInterrupt
            calls["left"] -= 1
            return function(*args)

        return call

    monkeypatch.setattr(safetensors_io, "_write_durably", interrupting(safetensors_io._write_durably))
    monkeypatch.setattr(os, "replace", interrupting(os.replace))
    if step < 4:
        with pytest.raises(KeyboardInterrupt):
            rk.save_adapters(new, tmp_path)
    else:
        rk.save_adapters(new, tmp_path)
    monkeypatch.undo()
    expected = old if step < 3 else new
    assert torch.equal(rk.load_adapters(base(), tmp_path).eval()(IDS), expected(IDS))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, MODEL]
