"""How fast every op and the whole layer steps are on a GPU, beside library calls and hand-written PyTorch.

A case has a shape (out_features x in_features x tokens), dtypes (bf16-fp32 means fp32 adapters over a bf16 weight), the
density of S where there is an S, and a mode (eager or graphed, see gpu_timing.py). The candidates beside "ours" are:

frozen   the library call on the frozen weight alone: F.linear, and dy @ W in a step; dyᵀ x for sddmm; W.clone() for
         csr_add
addmm    LoRA by F.linear and addmm_, with a hand-written backward
peft     LoRA by three matmuls through autograd
csr      S by torch.sparse, eagerly and where this PyTorch serves the dtype
apart    S scattered into zeros and multiplied on its own
dense    S scattered into a copy of W. In 16 bits the copy rounds away values that are small beside W, so that it is not
         judged in a layer. The dense dW of sddmm loses nothing.
rows     whole rows of S by three small GEMMs
hand     addmm for LoRA, apart for RoSA
triton   ours on that backend, and so for cuda: whether "auto" takes the faster of the two
"""

import torch
import torch.nn.functional as F

import rosa_kernels as rk
from gpu_results import Case
from gpu_timing import MODES
from hand_written import CSR, Dense, DenseApart, NoSparse, Rows, forward, lora_as_peft, spmm
from layer_steps import lora_step, rosa_step
from layers import Shape
from rosa_kernels import dispatch

MANY_TOKENS = [Shape(768, 768, 4096), Shape(3072, 768, 4096), Shape(4096, 4096, 2048), Shape(4096, 4096, 8192)]
FEW_TOKENS = [Shape(4096, 4096, tokens) for tokens in (1, 16, 64)]
DTYPES = ["bf16", "bf16-fp32", "fp16"]
DENSITIES, NO_S = (0.01, 0.001), (None,)
IN_FP32_TOO = MANY_TOKENS[0]
SELECTED = [MANY_TOKENS[0], MANY_TOKENS[2], FEW_TOKENS[0]]
LAUNCH_SECONDS = 5e-6
"""What ours may lose to the best other candidate in an eager call on few tokens. Python takes it, not the kernels."""


def over(shapes, dtypes=DTYPES, densities=DENSITIES[:1]):
    """Gives a test all combinations as its cases, and one shape in fp32 too."""

    def choose(test):
        test.cases = [
            (shape, name, density)
            for shape in shapes
            for density in densities
            for name in (*dtypes, *(["fp32"] if shape == IN_FP32_TOO else []))
        ]
        return test

    return choose


def tiny(shape: Shape) -> Shape:
    return Shape(48, 32, min(20, shape.tokens))


def pytest_generate_tests(metafunc):
    cases, device = metafunc.function.cases, "cuda"
    if metafunc.config.getoption("--shapes") == "selected":
        cases = [case for case in cases if case[0] in SELECTED]
    if metafunc.config.getoption("--gpu-dry-run"):
        cases, device = dict.fromkeys((tiny(shape), *rest) for shape, *rest in cases), "cpu"
    modes = [Case(shape, dtypes, mode, density, device) for shape, dtypes, density in cases for mode in MODES]
    metafunc.parametrize("case", modes, ids=str)


def unless_exact(case, *names):
    """The names of candidates that are shown and not judged, because their 16-bit results differ."""
    return () if case.dtypes == "fp32" else names


@over(MANY_TOKENS + FEW_TOKENS, densities=NO_S)
def test_gpu_lora_forward(gpu_race, case):
    layer = case.layer()
    arguments = (*layer.linear, *layer.lora)
    with torch.no_grad():
        gpu_race(
            {
                "frozen": lambda: (F.linear(*layer.linear),),
                "ours": lambda: (rk.lora_linear(*arguments),),
                "addmm": lambda: forward(*arguments, None, NoSparse())[:1],
                "peft": lambda: (lora_as_peft(*arguments),),
            },
            allowance=_launches(case),
        )


@over(FEW_TOKENS)
def test_gpu_rosa_forward(gpu_race, case):
    layer = case.layer()
    arguments = (*layer.linear, *layer.lora, layer.values)
    csr, apart, dense = CSR(layer.pattern, layer.dtype), DenseApart(layer.pattern), Dense(layer.pattern)
    with torch.no_grad():
        gpu_race(
            {
                "frozen": lambda: (F.linear(*layer.linear),),
                "ours": lambda: (rk.rosa_linear(*arguments, layer.pattern),),
                "csr": lambda: forward(*arguments, csr)[:1],
                "apart": lambda: forward(*arguments, apart)[:1],
                "dense": lambda: forward(*arguments, dense)[:1],
            },
            allowance=_launches(case),
            unjudged=unless_exact(case, "dense"),
        )


@over(MANY_TOKENS, densities=NO_S)
def test_gpu_lora_step(gpu_race, case):
    gpu_race(lora_step(case.layer()))


@over(MANY_TOKENS, densities=DENSITIES)
def test_gpu_rosa_step(gpu_race, case):
    layer = case.layer()
    gpu_race(
        rosa_step(
            layer,
            csr=CSR(layer.pattern, layer.dtype),
            apart=DenseApart(layer.pattern),
            dense=Dense(layer.pattern),
        ),
        unjudged=unless_exact(case, "dense"),
    )


@over(MANY_TOKENS)
def test_gpu_row_step(gpu_race, case):
    layer = case.layer("row")
    gpu_race(
        rosa_step(layer, rows=Rows(layer.rows, case.shape.in_features), dense=Dense(layer.pattern)),
        unjudged=unless_exact(case, "dense"),
    )


@over(MANY_TOKENS + FEW_TOKENS, densities=(*NO_S, *DENSITIES))
def test_gpu_backends(gpu_race, case):
    layer = case.layer()
    if case.density is None:
        steps, fastest = lora_step(layer), "addmm"
    else:
        steps, fastest = rosa_step(layer, apart=DenseApart(layer.pattern)), "apart"

    def on(backend):
        def step():
            with rk.use_backend(backend):
                return steps["ours"]()

        return step

    device = torch.device(case.device)
    served = (name for name in ("triton", "cuda") if dispatch.refusal(name, device, case.layer_dtype) is None)
    kept = {"frozen": steps["frozen"], "ours": steps["ours"], "hand": steps[fastest]}
    gpu_race(kept | {name: on(name) for name in served})


@over(MANY_TOKENS, densities=DENSITIES)
def test_gpu_spmm(gpu_race, case):
    layer = case.layer()
    csr, apart = CSR(layer.pattern, layer.dtype), DenseApart(layer.pattern)
    with torch.no_grad():
        gpu_race(
            {
                "frozen": lambda: (F.linear(layer.x, layer.weight),),
                "ours": lambda: (rk.spmm(layer.x, layer.values, layer.pattern),),
                "csr": lambda: (spmm(layer.x, layer.values, csr, case.shape.out_features),),
                "apart": lambda: (spmm(layer.x, layer.values, apart, case.shape.out_features),),
            }
        )


@over(MANY_TOKENS, dtypes=["bf16", "fp16"], densities=DENSITIES)
def test_gpu_sddmm(gpu_race, case):
    layer = case.layer()
    csr, dense = CSR(layer.pattern), Dense(layer.pattern)
    with torch.no_grad():
        gpu_race(
            {
                "frozen": lambda: (layer.dy.T @ layer.x,),
                "ours": lambda: (rk.sddmm(layer.dy, layer.x, layer.pattern),),
                "csr": lambda: (csr.gradient(layer.dy, layer.x).to(layer.dtype),),
                "dense": lambda: (dense.gradient(layer.dy, layer.x),),
            }
        )


@over(MANY_TOKENS[:3])
def test_gpu_csr_add(gpu_race, case):
    layer = case.layer()
    dense = Dense(layer.pattern)
    with torch.no_grad():
        gpu_race(
            {
                "frozen": lambda: (layer.weight.clone(),),
                "ours": lambda: (rk.csr_add(layer.weight, layer.values, layer.pattern),),
                "index_add": lambda: (dense.weight(layer.weight, layer.values),),
            }
        )


def _launches(case) -> float:
    return LAUNCH_SECONDS if case.mode == "eager" and case.shape in FEW_TOKENS else 0.0
