"""Which tests a run under TRITON_INTERPRET=1 takes, so that two cores end it in about four minutes.

A Triton operation costs the interpreter tens of microseconds whatever it holds, so a case costs what its tiles cost.
fp32 goes through all cases but the largest: its bounds are the narrowest, and addresses, masks, loops and sums are the
same for every dtype. bf16 then needs the cases with few tokens, and those of 63 and 129, which take several tiles. The
kernels of fp16 differ from bf16's in the number format alone: of bf16's cases it takes those that are not about a
pattern.
"""

import zlib

import torch

FOLDER_OF_ITS_OWN = "triton"
FEW_TOKENS = 16
TOKENS_IN_16_BITS = (63, 129)
PATTERNS_IN_FP16 = (None, "sparse", "random")
MOST_PRODUCTS = 4_000_000
"""tokens x in_features x out_features; T = 260, I = 300, O = 230 takes half a minute."""


def takes(item) -> bool:
    if item.path.parent.name == FOLDER_OF_ITS_OWN:
        return True
    if "backend" not in item.fixturenames:
        return False
    parameters = item.callspec.params
    rule = _RULES.get(item.originalname, _every_case_in_fp32)
    return rule(parameters, _tokens(parameters))


def takes_on_gpu(item) -> bool:
    """Half of the interpreted cases run on a GPU, where each kernel costs about a second of compiling.

    That leaves 338 of the 973 kernels of test_linear.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("backend") != "triton" or "case" not in parameters:
        return True
    rule = _RULES.get(item.originalname, _every_case_in_fp32)
    return rule(parameters, _tokens(parameters)) and zlib.crc32(parameters["case"].id.encode()) % 2 == 0


def _tokens(parameters) -> int:
    return parameters["case"].tokens if "case" in parameters else parameters.get("tokens", FEW_TOKENS)


def _in_fp32(parameters) -> bool:
    return parameters.get("dtype", torch.float32) == torch.float32


def _every_case_in_fp32(parameters, tokens: int) -> bool:
    case = parameters.get("case")
    if case is not None and tokens * case.in_features * case.out_features > MOST_PRODUCTS:
        return False
    if _in_fp32(parameters):
        return True
    if parameters["dtype"] == torch.float16 and case is not None and case.pattern not in PATTERNS_IN_FP16:
        return False
    return tokens <= FEW_TOKENS or tokens in TOKENS_IN_16_BITS


def _inputs_of_any_dimensions_in_fp32(parameters, tokens: int) -> bool:
    """The op is called as test_linear calls it."""
    return _in_fp32(parameters) and len(parameters["case"].leading) != 1


def _few_tokens_in_16_bits(parameters, tokens: int) -> bool:
    return not _in_fp32(parameters) and tokens <= FEW_TOKENS


def _one_pattern(parameters, tokens: int) -> bool:
    """All 62 combinations of gradients, once."""
    return (
        _in_fp32(parameters)
        and tokens <= FEW_TOKENS
        and parameters["pattern"] == "random"
        and parameters["dropout_p"] > 0
    )


def _one_seed(parameters, tokens: int) -> bool:
    """The wide seed; in 16 bits one p."""
    return parameters["seed"] > 2**32 and (_in_fp32(parameters) or parameters["p"] == 0.5)


def _never(parameters, tokens: int) -> bool:
    """The interpreter runs programs one after the other: it has nothing to say about the order of sums on a GPU."""
    return False


_RULES = {
    "test_linear_without_grad_gives_the_same_numbers": _inputs_of_any_dimensions_in_fp32,
    "test_errors_are_no_worse_than_naive_pytorchs": _few_tokens_in_16_bits,
    "test_every_combination_of_needed_gradients": _one_pattern,
    "test_one_mask_for_every_backend_forward_and_backward": _one_seed,
    "test_repeated_runs_give_the_same_bits": _never,
}
