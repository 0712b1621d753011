"""Dropout of the low-rank path: the generator, its statistics, and one mask for every backend, forward and backward."""

import pytest
import torch

import rosa_kernels as rk
from philox import keep_mask, philox4x32_10, seed_drawn_after
from rosa_kernels import dropout
from rosa_kernels.dropout import drop_threshold

_ops = torch.ops.rosa_kernels
ALL_ONES = 2**32 - 1


@pytest.mark.parametrize(
    "counter,key,words",
    [  # kat_vectors of Random123 1.14, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_tests_own_philox_gives_the_known_answers(counter, key, words):
    assert philox4x32_10(counter, key) == words


def test_the_packages_first_words_are_the_known_answer():
    """Seed 0, token 0, features 0 to 3: kept at exactly the thresholds up to the known words."""
    seed = torch.zeros(1, dtype=torch.int64)
    for feature, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        assert dropout.keep_mask(seed, 1, 4, word / 2**32)[0, feature]
        assert not dropout.keep_mask(seed, 1, 4, (word + 1) / 2**32)[0, feature]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**62 - 1])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
def test_keep_mask_is_philox(seed, p):
    for tokens, features in ((0, 3), (1, 1), (3, 18), (17, 7)):
        got = dropout.keep_mask(torch.tensor([seed]), tokens, features, p)
        assert torch.equal(got, keep_mask(seed, tokens, features, p))


def test_threshold_reaches_both_ends():
    assert drop_threshold(0.0) == 0 and drop_threshold(1.0) == 2**32 and drop_threshold(0.5) == 2**31


def test_keep_rate_and_independence():
    """At 2**20 elements a rate or a correlation of neighbours strays by five standard deviations once in 1e6 seeds."""
    tokens, features = 1024, 1024
    for p in (0.05, 0.5, 0.9):
        keep = dropout.keep_mask(torch.tensor([2024]), tokens, features, p).double()
        deviation = (p * (1 - p) / keep.numel()) ** 0.5
        assert abs(float(keep.mean()) - (1 - p)) < 5 * deviation
        centred = keep - (1 - p)
        other = dropout.keep_mask(torch.tensor([2025]), tokens, features, p).double() - (1 - p)
        for a, b in (
            (centred[1:], centred[:-1]),  # neighbouring tokens
            (centred[:, 1:], centred[:, :-1]),  # neighbouring features
            (centred[:, 4:], centred[:, :-4]),  # neighbouring counters
            (centred, other),  # neighbouring seeds
        ):
            assert abs(float((a * b).mean())) < 5 * p * (1 - p) / keep.numel() ** 0.5 * 1.01


def masks_of(tokens, features, p, seed, dtype, device):
    """dropout(1) in the forward and in the backward of the op: A = B = I and no other part."""
    eye = torch.eye(features, dtype=dtype, device=device)
    ones = torch.ones(tokens, features, dtype=dtype, device=device)
    seed = torch.tensor([seed], device=device)
    forward = _ops.rosa_linear(ones, None, None, eye, eye, 1.0, None, None, None, 0, p, seed)
    needs = [True, False, False, True, True, False]
    backward = _ops.rosa_linear_backward(
        ones, ones, None, eye, eye, 1.0, None, None, None, None, None, None, 0, p, seed, needs
    )
    return forward, backward


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("tokens,features", [(1, 1), (5, 7), (64, 33), (65, 64), (130, 50)])
@pytest.mark.parametrize("seed", [3, 2**40 + 17])
def test_one_mask_for_every_backend_forward_and_backward(backend, dtype, device, tokens, features, p, seed):
    keep = keep_mask(seed, tokens, features, p)
    forward, (dx, _, _, dA, dB, _) = masks_of(tokens, features, p, seed, dtype, device)
    scaled = keep.double() / (1 - p)
    eps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(forward.cpu().double(), scaled, rtol=eps, atol=0)
    torch.testing.assert_close(dx.cpu().double(), scaled, rtol=eps, atol=0)
    # dA = dHᵀ x̂ sums x̂ over the tokens, dB = Gᵀ H likewise.
    counts = scaled.sum(0).expand(features, -1)
    eps += tokens * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(dA.cpu().double(), counts, rtol=eps, atol=0)
    torch.testing.assert_close(dB.cpu().double(), counts, rtol=eps, atol=0)


def layer_tensors(device, dtype=torch.float32, tokens=70, features=40):
    pattern = rk.CSRPattern.random((features, features), 0.1, seed=1)
    sizes = (tokens, features), (features, features), (8, features), (features, 8), (pattern.nnz,)
    return *(torch.randn(size, dtype=dtype).to(device) for size in sizes), pattern.to(device)


def test_each_call_draws_anew_and_manual_seed_repeats_it(backend, dtype, device):
    x, weight, A, B, values, pattern = layer_tensors(device, dtype)

    def call():
        return rk.rosa_linear(x, weight, None, A, B, 1.0, values, pattern, dropout_p=0.5)

    torch.manual_seed(11)
    first, second = call(), call()
    torch.manual_seed(11)
    assert torch.equal(call(), first) and not torch.equal(first, second)


def test_the_seed_is_one_torch_randint(backend, device):
    x, weight, A, B, _, _ = layer_tensors(device)
    torch.manual_seed(11)
    y = rk.lora_linear(x, weight, None, A, B, 1.0, dropout_p=0.5)
    seed = torch.tensor([seed_drawn_after(11, device)], device=device)
    assert torch.equal(y, _ops.rosa_linear(x, weight, None, A, B, 1.0, None, None, None, 0, 0.5, seed))


def generator_state(device):
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


@pytest.mark.parametrize("off", ["p = 0", "not training"])
def test_off_is_off(backend, dtype, device, off):
    """No seed is drawn, and y is that of a call without dropout, bit for bit."""
    x, weight, A, B, values, pattern = layer_tensors(device, dtype)
    state = generator_state(device)
    options = {"dropout_p": 0.0} if off == "p = 0" else {"dropout_p": 0.5, "training": False}
    y = rk.rosa_linear(x, weight, None, A, B, 1.0, values, pattern, **options)
    assert torch.equal(generator_state(device), state)
    assert torch.equal(y, rk.rosa_linear(x, weight, None, A, B, 1.0, values, pattern))


def test_p_one_leaves_the_base_and_the_sparse_part(backend, dtype, device):
    """All of the low-rank path is dropped: zeros, not the 0 / 0 of a scale 1 / (1 - p)."""
    x, weight, A, B, values, pattern = layer_tensors(device, dtype)
    leaves = [t.requires_grad_() for t in (x, A, B, values)]
    y = rk.rosa_linear(x, weight, None, A, B, 1.0, values, pattern, dropout_p=1.0)
    expected = rk.sparse_linear(x, weight, None, values, pattern)
    dy = torch.randn_like(y)
    dx, dA, dB, dvalues = torch.autograd.grad(y, leaves, dy)
    assert not dA.any() and not dB.any()
    expected_dx, expected_dvalues = torch.autograd.grad(expected, (x, values), dy)
    for got, same in ((y, expected), (dx, expected_dx), (dvalues, expected_dvalues)):
        atol = 8 * torch.finfo(dtype).eps * float(same.detach().abs().max())
        torch.testing.assert_close(got, same, rtol=0, atol=atol)


def test_the_sparse_path_is_not_dropped(backend, device):
    """With lora_B = 0, dropout changes nothing."""
    x, weight, A, B, values, pattern = layer_tensors(device)
    leaves = [x.requires_grad_(), values.requires_grad_()]
    dropped = rk.rosa_linear(x, weight, None, A, torch.zeros_like(B), 1.0, values, pattern, dropout_p=0.5)
    whole = rk.sparse_linear(x, weight, None, values, pattern)
    torch.testing.assert_close(dropped, whole)
    dy = torch.randn_like(whole)
    for got, expected in zip(torch.autograd.grad(dropped, leaves, dy), torch.autograd.grad(whole, leaves, dy)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_mean_over_masks_is_the_value_without_dropout(backend, device):
    """E[y] is unchanged by dropout: over 4,000 tokens of the same x, within five standard errors."""
    tokens, features, p = 4000, 24, 0.4
    x = torch.randn(1, features).to(device).expand(tokens, features)
    A, B = torch.randn(4, features).to(device), torch.randn(6, 4).to(device)
    y = rk.rosa_delta(x, A, B, 1.0, None, None, dropout_p=p).double()
    standard_error = y.std(0) / tokens**0.5
    assert bool(((y.mean(0) - (x[0] @ A.T @ B.T).double()).abs() < 5 * standard_error).all())
