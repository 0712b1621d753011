"""torch.library.opcheck, torch.compile, torch.export: fakes tell the truth, no graph breaks, no needless recompiles."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import rosa_kernels as rk
from cases import LinearCase, LinearInputs, make_inputs

_ops = torch.ops.rosa_kernels
NAMES = LinearInputs.DIFFERENTIABLE
COMPILERS = pytest.mark.parametrize(
    "compiler",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)],  # which starts a C++ compiler
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):  # the generator of eager, so that seeds agree
        yield
    torch._dynamo.reset()


OPCHECK_CASES = {
    "rosa": LinearCase((2, 5), 18, 13, 4, lora_dtype=torch.float32),
    "rosa merged": LinearCase((40,), 18, 13, 4),
    "rows": LinearCase((9,), 18, 13, 4, "rows", bias=False),
    "lora": LinearCase((9,), 18, 13, 4, None),
    "sparse": LinearCase((9,), 18, 13, 0, "columns"),
    "delta": LinearCase((9,), 18, 13, 4, base=False),
    "nothing": LinearCase((0,), 18, 13, 4, "none"),
    "transposed": LinearCase(
        (9,), 18, 13, 4, x_layout="transposed", dy_layout="transposed", weight_layout="transposed"
    ),
}


def flat_pattern(pattern):
    """crow, col, (ccol, row, permutation), structure as the ops take them."""
    if pattern is None:
        return None, None, (None, None, None), 0
    return pattern.crow_indices, pattern.col_indices, pattern.transpose(), pattern.structure


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id=name, marks=() if name in ("rosa", "lora", "sparse", "nothing") else pytest.mark.exhaustive
        )
        for name, case in OPCHECK_CASES.items()
    ],
)
def test_opcheck_rosa_linear(backend, case, dropout_p):
    inputs = make_inputs(case, torch.bfloat16 if case.lora_dtype else torch.float32)
    crow, col, transposed, structure = flat_pattern(inputs.pattern)
    drops = dropout_p > 0 and case.r > 0
    seed = torch.tensor([5]) if drops else None
    p = dropout_p if drops else 0.0
    lora = inputs.lora_A, inputs.lora_B, 0.5
    forward = (inputs.x, inputs.weight, inputs.bias, *lora, inputs.values, crow, col, structure, p, seed)
    torch.library.opcheck(_ops.rosa_linear, forward)
    possible = [
        True,
        inputs.weight is not None,
        inputs.bias is not None,
        case.r > 0,
        case.r > 0,
        inputs.pattern is not None,
    ]
    for needs in (possible, [False] * 3 + possible[3:], [True] + [False] * 5):
        backward = (
            inputs.dy, inputs.x, inputs.weight, *lora, inputs.values, crow, col, *transposed, structure, p, seed, needs
        )  # fmt: skip
        torch.library.opcheck(_ops.rosa_linear_backward, backward)


@pytest.mark.parametrize("pattern", ["random", "rows", "columns", "none"])
def test_opcheck_sparse_ops(backend, pattern):
    inputs = make_inputs(LinearCase((2, 5), 18, 13, 0, pattern, values_dtype=torch.float32), torch.bfloat16)
    crow, col, _, structure = flat_pattern(inputs.pattern)
    torch.library.opcheck(_ops.spmm, (inputs.x, inputs.values, crow, col, structure))
    torch.library.opcheck(_ops.sddmm, (inputs.dy, inputs.x, crow, col, structure))
    torch.library.opcheck(_ops.csr_add, (inputs.weight, inputs.values, crow, col))


def two_layers(t, pattern, scaling=0.75, dropout_p=0.0):
    """A layer, a non-linearity and the layer's ops on their own, so that the graph has something around them."""
    y = rk.rosa_linear(
        t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], scaling, t["values"], pattern, dropout_p=dropout_p
    )
    y = torch.nn.functional.gelu(y)
    dW = rk.sddmm(y, t["x"], pattern)
    return y + rk.spmm(t["x"], dW, pattern).tanh() + rk.csr_add(t["weight"], dW, pattern).sum()


def assert_equal_to_eager(function, compiled, inputs, needing=NAMES, exactly=False):
    eager, traced = inputs.leaves(needing), inputs.leaves(needing)
    torch.manual_seed(3)
    expected = function(eager)
    expected.backward(inputs.dy)
    torch.manual_seed(3)
    got = compiled(traced)
    got.backward(inputs.dy)
    rtol, atol = (0.0, 0.0) if exactly else (1e-4, 1e-4)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    for name in needing:
        torch.testing.assert_close(traced[name].grad, eager[name].grad, rtol=rtol, atol=atol * len(inputs.x))
    assert all(traced[name].grad is None for name in NAMES if name not in needing)


@COMPILERS
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiled_equals_eager(backend, compiler, dropout_p):
    inputs = make_inputs(LinearCase((2, 11), 18, 13, 4), torch.float32)
    function = lambda t: two_layers(t, inputs.pattern, dropout_p=dropout_p)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    assert_equal_to_eager(function, compiled, inputs)
    assert_equal_to_eager(function, compiled, inputs, needing=("x", "lora_A", "lora_B", "values"))


def test_compiled_graphs_hold_the_kernels_ops(backend):
    """Neither the forward nor the backward is taken apart into plain PyTorch."""
    graphs = []

    def record(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    inputs = make_inputs(LinearCase((12,), 18, 13, 4), torch.float32)
    compiled = torch.compile(two_layers, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    compiled(inputs.leaves(), inputs.pattern).sum().backward()
    ops = torch.ops.rosa_kernels
    forward, backward = graphs
    called = {ops.rosa_linear.default, ops.spmm.default, ops.sddmm.default, ops.csr_add.default}
    assert called <= {*forward} and {ops.rosa_linear_backward.default, ops.spmm.default} <= {*backward}
    assert not {torch.ops.aten.mm.default, torch.ops.aten.addmm.default} & {*forward, *backward}


def test_compiled_frozen_layer_in_bf16_under_autocast(backend):
    inputs = make_inputs(LinearCase((2, 11), 18, 13, 4, "rows"), torch.float32)
    inputs.dy = inputs.dy.to(torch.bfloat16)

    def function(t):
        with torch.autocast("cpu", torch.bfloat16):
            return rk.rosa_linear(
                t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], 2.0, t["values"], inputs.pattern
            )

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_equal_to_eager(function, compiled, inputs, needing=("lora_A", "lora_B", "values"), exactly=True)


def test_compiled_without_grad(backend):
    inputs = make_inputs(LinearCase((2, 11), 18, 13, 4), torch.float32)
    t = inputs.tensors()
    with torch.no_grad():
        compiled = torch.compile(lambda t: two_layers(t, inputs.pattern), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(t), two_layers(t, inputs.pattern))


@COMPILERS
def test_checkpointing_a_compiled_layer(backend, compiler):
    """The recomputed forward draws the same dropout mask."""
    inputs = make_inputs(LinearCase((2, 11), 18, 13, 4), torch.float32)

    def function(t):
        layer = lambda x: two_layers(t | {"x": x}, inputs.pattern, dropout_p=0.3)
        return checkpoint(layer, t["x"], use_reentrant=False)

    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    assert_equal_to_eager(function, compiled, inputs)


def test_a_new_number_of_tokens_does_not_recompile_each_time(backend):
    """Once for the first, once with a symbolic size, then never."""
    counter = CompileCounterWithBackend("aot_eager")
    inputs = {tokens: make_inputs(LinearCase((tokens,), 18, 13, 4), torch.float32) for tokens in (7, 30, 5, 64, 129)}
    pattern = inputs[7].pattern
    function = lambda t: two_layers(t, pattern, dropout_p=0.3)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for case in inputs.values():
        assert_equal_to_eager(function, compiled, case)
    assert counter.frame_count <= 2


@pytest.mark.exhaustive
@pytest.mark.xfail(
    strict=True, reason="Dynamo makes a constant of a Python float that an op takes: a graph for every value of scaling"
)
def test_a_new_scaling_does_not_recompile_each_time(backend):
    counter = CompileCounterWithBackend("aot_eager")
    inputs = make_inputs(LinearCase((9,), 18, 13, 4), torch.float32)
    function = lambda t, scaling: two_layers(t, inputs.pattern, scaling)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for scaling in (0.5, 1.0, 2.0, 3.5, 16.0):
        torch.testing.assert_close(compiled(inputs.leaves(), scaling), function(inputs.leaves(), scaling))
    assert counter.frame_count <= 2


def test_new_values_do_not_recompile_or_go_stale(backend):
    counter = CompileCounterWithBackend("aot_eager")
    inputs = make_inputs(LinearCase((9,), 18, 13, 4), torch.float32)
    inputs.pattern.transpose()  # else made in the first graph, cached after it, and so a second graph without it
    leaves = inputs.leaves()
    compiled = torch.compile(lambda t: two_layers(t, inputs.pattern), backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(leaves), two_layers(leaves, inputs.pattern))
        for leaf in leaves.values():
            leaf.data.mul_(1.5)
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    """The layer as a module, for export."""

    def __init__(self, inputs):
        super().__init__()
        for name in NAMES[1:]:
            setattr(self, name, torch.nn.Parameter(getattr(inputs, name)))
        self.pattern = inputs.pattern

    def forward(self, x):
        return rk.rosa_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, 0.5, self.values, self.pattern)


def test_export_of_an_embedding_with_dynamic_tokens():
    """From fewer tokens than rows to more, where an eager call adapts the rows."""
    pattern = rk.CSRPattern.from_rows(torch.tensor([3, 7]), (10, 8))
    layer = rk.nn.RoSAEmbedding(torch.nn.Embedding(10, 8), 2, 4, pattern=pattern)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    exported = torch.export.export(layer, (torch.arange(4),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    for tokens in (4, 40):
        ids = torch.arange(tokens) % 10
        torch.testing.assert_close(exported.module()(ids), layer(ids))


@pytest.mark.parametrize("grad", [True, False])
def test_export_with_dynamic_tokens(backend, grad):
    inputs = make_inputs(LinearCase((12,), 18, 13, 4), torch.float32)
    layer = Layer(inputs)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(layer, (inputs.x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        for tokens in (12, 3, 100):
            x = torch.randn(tokens, 18)
            torch.testing.assert_close(exported.module()(x), layer(x))
