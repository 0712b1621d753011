"""The quick check of a linear call's arguments has the full check's verdict, whatever the arguments are."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rosa_kernels as rk
from rosa_kernels import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFUSED_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "values", "pattern")
PATTERNS = {(out, into): rk.CSRPattern.random((out, into), 0.5, seed=0) for out in (0, 1, 3) for into in (0, 1, 2)}

dtypes = st.sampled_from(DTYPES)
all_dtypes = st.sampled_from(DTYPES + REFUSED_DTYPES)
devices = st.sampled_from(("cpu", "meta"))
sizes = st.integers(0, 3)
wrong_types = st.sampled_from((None, 1, 2.0, [[1.0]], "x", torch.ones(2, 3).numpy(), torch.Size([2])))
any_tensors = st.builds(
    lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device),
    st.lists(sizes, max_size=3),
    all_dtypes,
    devices,
)
any_patterns = st.builds(lambda shape, device: PATTERNS[shape].to(device), st.sampled_from(sorted(PATTERNS)), devices)


@st.composite
def valid_arguments(draw):
    """Arguments of the kind that the quick check is for: a base, a low-rank part, and perhaps a sparse one."""
    (out_features, in_features), r = draw(st.sampled_from(sorted(PATTERNS))), draw(st.integers(1, 3))
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


@st.composite
def changed_arguments(draw):
    """Arguments with or without a base and a low-rank part, of which up to two are replaced by something else."""
    arguments = draw(valid_arguments())
    left_out = draw(st.sampled_from(((), (), (), ("weight", "bias"), ("lora_A", "lora_B"))))
    arguments |= dict.fromkeys(left_out)
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=2)):
        old = arguments[name]
        like_the_old = [st.just(old)]
        if isinstance(old, torch.Tensor):
            like_the_old = [
                st.builds(torch.empty_like, st.just(old), dtype=all_dtypes),
                st.builds(torch.empty_like, st.just(old), device=devices),
                st.just(old.mT if old.dim() > 1 else old[None]),
                st.just(old.new_empty(())),
            ]
        arguments[name] = draw(st.one_of(*like_the_old, any_tensors, any_patterns, wrong_types))
    return arguments


def refusal(arguments):
    """What the full check raises, or None; what it returns are the tensors as they came."""
    try:
        checked = functional._checked(**arguments)
    except (TypeError, ValueError) as error:
        return error
    assert all(got is arguments[name] for got, name in zip(checked, ("x", "weight", "bias"), strict=True))
    return None


@settings(max_examples=500)
@given(valid_arguments())
def test_valid_arguments_pass_both_checks(arguments):
    assert functional._fits(**arguments) and refusal(arguments) is None


@settings(max_examples=1500, suppress_health_check=[HealthCheck.too_slow])
@given(changed_arguments())
def test_both_checks_have_one_verdict(arguments):
    """The quick check is for calls with a weight and a low-rank part; of the others it knows nothing and says no."""
    passes = refusal(arguments) is None
    for_the_quick_check = all(arguments[name] is not None for name in ("weight", "lora_A", "lora_B"))
    assert functional._fits(**arguments) == (passes and for_the_quick_check)
