"""Layers with an adapter: what they compute, what they train, and that merging loses nothing."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import rosa_kernels as rk
from rosa_kernels.pattern import BLOCK
from small_layers import ALPHA, IN, LAYERS, OUT, R, make_base, pattern_of, randomise, trained_layer

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_fresh_adapter_changes_nothing(backend, dtype, kind, bias):
    """But roundings of sums where the CPU's kernels multiply the base too."""
    base = make_base(dtype, bias)
    layer = LAYERS[kind](copy.deepcopy(base))
    for leading in ((9, 9), (5, 7), (), (0,)):
        x = torch.randn(*leading, IN, dtype=dtype)
        tolerance = TOLERANCE[dtype] if backend == "cpu" else 0
        torch.testing.assert_close(layer(x), base(x), rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), base(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", LAYERS)
def test_output_is_base_plus_delta(backend, dtype, kind):
    layer = trained_layer(kind, dtype)
    x = torch.randn(6, IN, dtype=dtype)
    expected = F.linear(x.double(), layer.weight.double() + layer.delta_weight().double(), layer.bias.double())
    error = (layer(x).double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", LAYERS)
def test_only_the_adapter_gets_gradients(backend, kind):
    layer = LAYERS[kind](make_base())
    if kind == "rosa-unselected":
        assert layer.values["default"].requires_grad, "an optimiser built now has to hold the values"
    x = torch.randn(6, IN, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and x.grad is not None
    if layer.r:
        assert layer.lora_B["default"].grad.abs().sum() > 0
    if layer.has_sparse:
        assert (layer.sparse_values.grad is not None) == layer.masks_selected
    if layer.masks_selected and layer.sparse_values.numel():
        assert layer.sparse_values.grad.ne(0).all(), "explicit zeros keep their place and their gradient"


def test_the_state_dict_has_the_promised_names():
    keys = set(rk.nn.RoSALinear(make_base(), R, ALPHA, adapter_name="task").state_dict())
    assert keys == {
        "base_layer.weight", "base_layer.bias", "lora_A.task", "lora_B.task", "values.task",
        "patterns.task.crow_indices", "patterns.task.col_indices",
    }  # fmt: skip


def test_the_layer_looks_like_its_base():
    base = make_base()
    layer = rk.nn.LoRALinear(base, R, ALPHA)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (IN, OUT)


def test_scaling():
    assert rk.nn.LoRALinear(make_base(), 4, 8).scaling == 2
    assert rk.nn.LoRALinear(make_base(), 4, 8, use_rslora=True).scaling == 4


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_adapters_are_never_narrower_than_fp32(dtype, expected):
    layer = LAYERS["rosa"](make_base(dtype))
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {expected}


@pytest.mark.parametrize("structure", ["unstructured", "row", "column", "block"])
def test_values_are_allocated_for_the_density(structure):
    layer = rk.nn.RoSALinear(make_base(), R, ALPHA, density=0.1, structure=structure, block_size=8)
    expected = {"unstructured": round(0.1 * OUT * IN), "row": 2 * IN, "column": 4 * OUT, "block": 2 * 64}
    assert layer.sparse_values.shape == (expected[structure],)
    least = rk.nn.RoSALinear(make_base(), R, ALPHA, density=1e-6, structure=structure, block_size=8)
    one = {"unstructured": 0, "row": IN, "column": OUT, "block": 64}
    assert least.sparse_values.shape == (one[structure],)


@pytest.mark.parametrize(
    "build, error, text",
    [
        (lambda: rk.nn.LoRALinear(make_base(), 0, 1), ValueError, "r: expected at least 1"),
        (lambda: rk.nn.RoSALinear(make_base(), -1, 1), ValueError, "r: expected at least 0"),
        (lambda: rk.nn.RoSALinear(make_base(), 0, 1, density=0), ValueError, "no adapter"),
        (lambda: rk.nn.RoSALinear(make_base(), 1, 1, density=1.5), ValueError, "density"),
        (lambda: rk.nn.LoRALinear(make_base(), 1, 1, -0.1), ValueError, "lora_dropout"),
        (lambda: rk.nn.LoRALinear(make_base(), 1, float("nan")), ValueError, "lora_alpha"),
        (lambda: rk.nn.LoRALinear(make_base(), 1.5, 1), TypeError, "r: expected an integer"),
        (lambda: rk.nn.RoSALinear(make_base(), 1, 1, structure="diagonal"), ValueError, "structure"),
        (lambda: rk.nn.LoRALinear(make_base(), 1, 1, adapter_name="a.b"), ValueError, "adapter_name"),
        (lambda: rk.nn.LoRALinear(make_base(), 1, 1, adapter_name="keys"), ValueError, "adapter_name"),
        (lambda: rk.nn.LoRALinear(rk.nn.LoRALinear(make_base(), 1, 1), 1, 1), TypeError, "without an adapter"),
        (lambda: rk.nn.LoRALinear(nn.LazyLinear(4), 1, 1), ValueError, "initialised"),
        (lambda: rk.nn.LoRALinear(nn.ReLU(), 1, 1), TypeError, "base_layer"),
        (
            lambda: rk.nn.RoSALinear(make_base(), 1, 1, pattern=rk.CSRPattern.random((IN, OUT), 0.1, 0)),
            ValueError,
            "pattern: expected shape",
        ),
    ],
)
def test_wrong_arguments_are_named(build, error, text):
    with pytest.raises(error, match=text):
        build()


# Moving, copying, state


def test_indices_stay_int32_when_floats_change():
    layer = trained_layer().half()
    assert layer.patterns["default"].crow_indices.dtype == torch.int32
    assert layer.sparse_values.dtype == torch.float16
    assert layer(torch.randn(2, IN, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("kind", LAYERS)
def test_deepcopy_and_state_dict_round_trips(kind):
    layer = trained_layer(kind)
    x = torch.randn(4, IN)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LAYERS[kind](make_base())
    if layer.has_sparse:
        other = rk.nn.RoSALinear(make_base(), layer.r, ALPHA, density=0.1)  # another number of values, not selected
    held = dict(other.named_parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    assert all(parameter is held[name] for name, parameter in other.named_parameters())
    if layer.masks_selected:
        assert other.sparse_pattern() == layer.sparse_pattern()
        y = [module(x).square().sum() for module in (layer, other)]
        y[0].backward(), y[1].backward()
        assert torch.equal(layer.sparse_values.grad, other.sparse_values.grad)


def test_an_unselected_state_dict_unselects():
    layer = trained_layer("rosa")
    fresh = rk.nn.RoSALinear(make_base(), R, ALPHA, density=layer.density)
    layer.load_state_dict(fresh.state_dict())
    assert not layer.masks_selected


def test_loading_the_base_alone_keeps_the_pattern():
    layer = trained_layer()
    pattern = layer.sparse_pattern()
    base_only = {key: value for key, value in layer.state_dict().items() if key.startswith("base_layer")}
    missing = layer.load_state_dict(base_only, strict=False).missing_keys
    assert "patterns.default.col_indices" in missing and layer.sparse_pattern() == pattern


@pytest.mark.parametrize("fault", ["out of range", "duplicate", "unsorted", "float", "crow falls"])
def test_a_state_dict_with_bad_indices_is_refused(fault):
    layer = trained_layer()
    state = copy.deepcopy(layer.state_dict())
    crow, col = state["patterns.default.crow_indices"], state["patterns.default.col_indices"]
    row = int((crow.diff() >= 2).nonzero()[0])
    first = int(crow[row])
    if fault == "out of range":
        col[-1] = IN
    elif fault == "duplicate":
        col[first + 1] = col[first]
    elif fault == "unsorted":
        col[[first, first + 1]] = col[[first + 1, first]]
    elif fault == "float":
        state["patterns.default.col_indices"] = col.float()
    else:
        crow[row + 1] = -1
    with pytest.raises(RuntimeError, match=r"patterns\.default: (crow|col)_indices"):
        layer.load_state_dict(state)


def test_blocks_stay_blocks_through_a_state_dict():
    layer = rk.nn.RoSALinear(make_base(), 0, ALPHA, density=0.1, structure="block", block_size=8)
    layer.place_pattern(rk.CSRPattern.from_blocks(torch.eye(3, 5, dtype=torch.bool), 8, (OUT, IN)))
    other = rk.nn.RoSALinear(make_base(), 0, ALPHA, density=0.1, structure="block", block_size=8)
    other.load_state_dict(layer.state_dict())
    assert other.sparse_pattern().structure == layer.sparse_pattern().structure == BLOCK


def test_meta_device_then_assign():
    layer = trained_layer()
    with torch.device("meta"):
        empty = rk.nn.RoSALinear(nn.Linear(IN, OUT), R, ALPHA, pattern=None, density=layer.density)
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, IN)
    assert torch.equal(empty(x), layer(x))


# Other bases


class Doubled(nn.Linear):
    """A base that does not compute F.linear, as quantised layers do not."""

    def forward(self, x):
        return 2 * super().forward(x)


class Halved(torch.Tensor):
    """A weight that is not what its storage says, as quantised tensor subclasses are not."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is not F.linear:
            return result
        return F.linear(args[0], 0.5 * args[1].as_subclass(torch.Tensor), *args[2:])


def test_a_tensor_subclass_computes_its_own_part(backend):
    base = make_base()
    plain = base.weight.detach().clone()
    base.weight = nn.Parameter(plain.as_subclass(Halved), requires_grad=False)
    layer = randomise(LAYERS["rosa"](base))
    assert type(layer.weight) is Halved
    x = torch.randn(5, IN)
    torch.testing.assert_close(layer(x), F.linear(x, 0.5 * plain, base.bias) + x @ layer.delta_weight().T)
    with pytest.raises(RuntimeError, match="Halved"):
        layer.merge()


@pytest.mark.parametrize("kind", LAYERS)
def test_any_other_base_computes_its_own_part(backend, kind):
    base = Doubled(IN, OUT)
    layer = randomise(LAYERS[kind](copy.deepcopy(base)))
    x = torch.randn(5, IN)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta_weight().T)


def test_hooks_on_the_base_still_run():
    base = make_base()
    calls = []
    base.register_forward_hook(lambda *_: calls.append(1))
    trained_layer()  # a layer without hooks is not affected
    layer = randomise(LAYERS["rosa"](base))
    x = torch.randn(5, IN)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias))
    assert calls == [1]


def test_a_trainable_base_weight_gets_its_gradient(backend):
    layer = trained_layer()
    layer.base_layer.weight.requires_grad_(True)
    x, G = torch.randn(5, IN), torch.randn(5, OUT)
    layer(x).backward(G)
    torch.testing.assert_close(layer.weight.grad, G.T @ x)


# Training


def optimisers():
    yield "adamw-foreach", lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True)
    yield "adamw-fused", lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)
    yield "sgd", lambda p: torch.optim.SGD(p, lr=1e-2)


@pytest.mark.parametrize("name, make", list(optimisers()), ids=[name for name, _ in optimisers()])
def test_steps_follow_a_dense_model(backend, name, make):
    layer = trained_layer()
    dense = {key: nn.Parameter(p.detach().clone()) for key, p in layer.named_parameters() if p.requires_grad}
    rows, cols = layer.sparse_pattern().row_of_entry(), layer.sparse_pattern().col_indices.long()
    optimiser, expected = make([p for p in layer.parameters() if p.requires_grad]), make(dense.values())
    x, target = torch.randn(16, IN), torch.randn(16, OUT)
    for _ in range(10):
        optimiser.zero_grad(), expected.zero_grad()
        F.mse_loss(layer(x), target).backward()
        S = torch.zeros(OUT, IN).index_put((rows, cols), dense["values.default"])
        W = layer.weight + layer.scaling * dense["lora_B.default"] @ dense["lora_A.default"] + S
        F.mse_loss(F.linear(x, W, layer.bias), target).backward()
        optimiser.step(), expected.step()
    for key, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, dense[key], rtol=1e-4, atol=1e-5)


def test_writing_through_data_is_seen(backend):
    layer = trained_layer()
    x = torch.randn(4, IN)
    before = layer(x)
    layer.lora_B["default"].data.mul_(2)
    layer.sparse_values.data.mul_(2)
    assert not torch.equal(layer(x), before)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_trains_the_adapter(backend, reentrant):
    layer = trained_layer()
    x = torch.randn(4, IN, requires_grad=True)  # as enable_input_require_grads makes them
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0 and torch.equal(dict(layer.named_parameters())[name].grad, gradient)


@pytest.mark.parametrize("kind", ["lora", "rosa", "sparse", "rosa-unselected"])
def test_compiled_equals_eager(kind):
    layer = trained_layer(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, IN, requires_grad=True)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        y = module(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        y.square().sum().backward()
        results.append([y, dx, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_autocast_reaches_the_base_and_spares_the_adapter(backend):
    layer = trained_layer()
    x = torch.randn(4, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.lora_A["default"].dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)
    y.float().sum().backward()
    assert layer.lora_A["default"].grad.dtype == torch.float32


def test_dropout_only_in_training_and_only_on_the_low_rank_path(backend):
    layer = randomise(rk.nn.RoSALinear(make_base(), R, ALPHA, 1.0, pattern=pattern_of()))
    x = torch.randn(4, IN)
    without_lora = F.linear(x, layer.weight, layer.bias) + rk.spmm(x, layer.sparse_values, layer.sparse_pattern())
    torch.testing.assert_close(layer(x), without_lora)
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias))
