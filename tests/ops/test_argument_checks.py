"""The quick check of a linear call's arguments has the full check's verdict, whatever the arguments are."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rosa_kernels as rk
from rosa_kernels import checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFUSED_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "values", "pattern")
PATTERNS = {(out, into): rk.CSRPattern.random((out, into), 0.5, seed=0) for out in (0, 1, 3) for into in (0, 1, 2)}

WRONG_TYPES = (None, 1, 2.0, [[1.0]], "x", torch.ones(2, 3).numpy(), torch.Size([2]))

dtypes = st.sampled_from(DTYPES)
devices = st.sampled_from(("cpu", "meta"))
sizes = st.integers(0, 3)


@st.composite
def arguments_that_agree(draw, smallest_r=1):
    """Arguments of the kind that the quick check is for: a base, a low-rank part, and perhaps a sparse one."""
    (out_features, in_features), r = draw(st.sampled_from(sorted(PATTERNS))), draw(st.integers(smallest_r, 3))
    device, dtype, leading = draw(devices), draw(dtypes), draw(st.lists(sizes, max_size=2))

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    pattern = PATTERNS[out_features, in_features].to(device) if draw(st.booleans()) else None
    return {
        "x": tensor(*leading, in_features),
        "weight": tensor(out_features, in_features),
        "bias": tensor(out_features) if draw(st.booleans()) else None,
        "lora_A": tensor(r, in_features, dtype=draw(dtypes)),
        "lora_B": tensor(out_features, r, dtype=draw(dtypes)),
        "values": None if pattern is None else tensor(pattern.nnz, dtype=draw(dtypes)),
        "pattern": pattern,
    }


def replacements(old):
    """What takes an argument's place: its like of another dtype, device or shape, another pattern, a wrong type."""
    if isinstance(old, torch.Tensor):
        shape = tuple(old.shape)
        resized = [
            (*shape[:i], max(0, shape[i] + step), *shape[i + 1 :]) for i in range(len(shape)) for step in (-1, 1)
        ]
        shapes = [*resized, shape[::-1], (1, *shape), shape[1:], ()]
        if old.layout is not torch.strided:
            return list(WRONG_TYPES)
        like_the_old = [old.new_empty(other) for other in shapes]
        like_the_old += [torch.empty_like(old, dtype=dtype) for dtype in DTYPES + REFUSED_DTYPES]
        like_the_old += [torch.empty_like(old, device=device) for device in ("cpu", "meta")]
        like_the_old += [torch.zeros(shape).to_sparse(), torch.zeros(shape).to_mkldnn()] if shape else []
    elif isinstance(old, rk.CSRPattern):
        like_the_old = [*PATTERNS.values(), old.to("meta"), old.to_mask()]
    else:
        like_the_old = [torch.empty(2), PATTERNS[3, 2]]
    return [*like_the_old, *WRONG_TYPES]


@st.composite
def changed_arguments(draw):
    """Arguments with or without a base and a low-rank part, of which up to three are replaced by something else."""
    arguments = draw(arguments_that_agree(smallest_r=0))
    arguments |= dict.fromkeys(draw(st.sampled_from(((), (), (), ("weight", "bias"), ("lora_A", "lora_B")))))
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        arguments[name] = draw(st.sampled_from(replacements(arguments[name])))
    return arguments


def refusal(arguments):
    """What the full check raises, or None."""
    try:
        checks.check_linear_types(**arguments)
        checks.check_linear(**arguments)
    except (TypeError, ValueError) as error:
        return error
    return None


@given(arguments_that_agree())
def test_valid_arguments_pass_both_checks(arguments):
    assert checks.linear_fits(**arguments) and refusal(arguments) is None


def assert_one_verdict(arguments):
    """The quick check is for calls with a weight and a low-rank part; of the others it knows nothing and says no."""
    passes = refusal(arguments) is None
    for_the_quick_check = all(arguments[name] is not None for name in ("weight", "lora_A", "lora_B"))
    assert checks.linear_fits(**arguments) == (passes and for_the_quick_check)


@pytest.mark.parametrize("r", (0, 1, 2))
@pytest.mark.parametrize("shape", [(3, 2), (1, 1)])
def test_both_checks_have_one_verdict_on_every_two_changes(shape, r):
    (out_features, in_features), pattern = shape, PATTERNS[shape]
    arguments = {
        "x": torch.empty(4, in_features),
        "weight": torch.empty(out_features, in_features),
        "bias": torch.empty(out_features),
        "lora_A": torch.empty(r, in_features),
        "lora_B": torch.empty(out_features, r),
        "values": torch.empty(pattern.nnz),
        "pattern": pattern,
    }
    assert_one_verdict(arguments)
    candidates = {name: [arguments[name], *replacements(arguments[name])] for name in NAMES}
    for first, second in itertools.combinations(NAMES, 2):
        for changes in itertools.product(candidates[first], candidates[second]):  # 12,500 lists
            assert_one_verdict(arguments | dict(zip((first, second), changes, strict=True)))


@settings(max_examples=500)
@given(changed_arguments())
def test_both_checks_have_one_verdict(arguments):
    assert_one_verdict(arguments)
