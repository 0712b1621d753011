"""What the GPU backends plan with on devices that are not here: PyTorch's word on each device is replaced."""

import types

import pytest
import torch

from cost_model_cases import calls
from rosa_kernels.backends.cuda import heuristics as cuda_heuristics
from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.cost_model import SDDMMCall
from rosa_kernels.backends.gpu.device_rates import DATA_SHEETS, RATES
from rosa_kernels.backends.triton import heuristics as triton_heuristics

GPU = torch.device("cuda", 0)
KiB, GHz, TB = 1024, 1e9, 1e12


def nvidia(name, capability, multiprocessors, clock_MHz, memory_MHz, bus_bits, shared_KiB):
    """As PyTorch tells a device's properties: clocks in kHz."""
    return types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=multiprocessors,
        clock_rate=1000 * clock_MHz, memory_clock_rate=1000 * memory_MHz, memory_bus_width=bus_bits,
        shared_memory_per_block=48 * KiB, shared_memory_per_block_optin=shared_KiB * KiB,
    )  # fmt: skip


def amd(name, arch, multiprocessors, clock_MHz, memory_MHz, bus_bits, shared_KiB):
    """HIP's properties; memory_MHz is the clock of the memory's controller."""
    properties = nvidia(name, (9, 4), multiprocessors, clock_MHz, memory_MHz, bus_bits, shared_KiB)
    del properties.shared_memory_per_block_optin
    properties.gcnArchName, properties.shared_memory_per_block = f"{arch}:sramecc+:xnack-", shared_KiB * KiB
    return properties


H100 = nvidia("NVIDIA H100 80GB HBM3", (9, 0), 132, 1980, 2619, 5120, 227)
H200 = nvidia("NVIDIA H200", (9, 0), 132, 1980, 3201, 6144, 227)
A100 = nvidia("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1410, 1593, 5120, 163)
RTX_3090 = nvidia("NVIDIA GeForce RTX 3090", (8, 6), 82, 1695, 9751, 384, 99)
RTX_4090 = nvidia("NVIDIA GeForce RTX 4090", (8, 9), 128, 2520, 10501, 384, 99)
B200 = nvidia("NVIDIA B200", (10, 0), 148, 1965, 3996, 8192, 227)
B300 = nvidia("NVIDIA B300 SXM6 AC", (10, 3), 148, 1920, 3996, 8192, 227)
RTX_5090 = nvidia("NVIDIA GeForce RTX 5090", (12, 0), 170, 2407, 14001, 512, 99)
MI210 = amd("AMD Instinct MI210", "gfx90a", 104, 1700, 1600, 4096, 64)
MI250X = amd("AMD Instinct MI250X", "gfx90a", 110, 1700, 1600, 4096, 64)
MI300X = amd("AMD Instinct MI300X", "gfx942", 304, 2100, 1300, 8192, 64)
MI325X = amd("AMD Instinct MI325X", "gfx942", 304, 2100, 1500, 8192, 64)
MI355X = amd("AMD Instinct MI355X", "gfx950", 256, 2400, 2000, 8192, 160)

DEVICES = [
    # device, architecture, 16-bit TFLOP/s and TB/s of its data sheet
    (H100, "sm_90", None, 3.35),
    (H200, "sm_90", None, 4.8),
    (A100, "sm_80", 312, 2.04),
    (RTX_3090, "sm_86", 71, 0.936),
    (RTX_4090, "sm_89", 165, 1.008),
    (B200, "sm_100", 2250, 8.0),
    (B300, "sm_103", 2250, 8.0),
    (RTX_5090, "sm_120", 209, 1.792),
    (MI210, "gfx90a", 181, 1.64),
    (MI250X, "gfx90a", 191, 1.64),
    (MI300X, "gfx942", 1307, 5.3),
    (MI325X, "gfx942", 1307, 6.0),
    (MI355X, "gfx950", 2516, 8.0),
]


def forget() -> None:
    for remembered in (hardware.architecture, hardware.multiprocessors, hardware.shared_memory, device_rates.rates):
        remembered.cache_clear()
    device_rates._tables.pop(GPU, None)


@pytest.fixture
def present(monkeypatch, tmp_path):
    """A function that puts a device in the machine."""

    def put(properties) -> None:
        forget()
        monkeypatch.setattr(torch.version, "hip", "7.0" if hasattr(properties, "gcnArchName") else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties.name)

    monkeypatch.setenv("ROSA_KERNELS_TUNED", str(tmp_path))
    yield put
    forget()


@pytest.fixture
def tf32_wanted():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def rates_of_the_gpu() -> device_rates.Rates:
    return device_rates.rates(GPU, hardware.architecture(GPU))


def without(properties, *names: str):
    return types.SimpleNamespace(**{name: value for name, value in vars(properties).items() if name not in names})


@pytest.mark.parametrize(
    ("device", "architecture", "tflops", "bandwidth"), DEVICES, ids=[device.name for device, *_ in DEVICES]
)
def test_a_device_is_planned_for_by_its_own_figures(present, device, architecture, tflops, bandwidth):
    present(device)
    rates = rates_of_the_gpu()
    assert hardware.architecture(GPU) == architecture
    assert rates.multiprocessors == hardware.multiprocessors(GPU) == device.multi_processor_count
    reached = RATES[architecture].bandwidth / DATA_SHEETS[architecture].bandwidth
    assert rates.bandwidth == pytest.approx(reached * bandwidth * TB, rel=0.03) and 0.7 < reached <= 0.91
    if tflops is not None:
        assert rates.flops_16_bit == pytest.approx(0.7 * tflops * 1e12, rel=0.03)
    optin = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block + KiB)
    assert rates.shared_memory == hardware.shared_memory(GPU) == optin - KiB


@pytest.mark.parametrize("row", RATES)
def test_an_architecture_has_rates_a_data_sheet_and_shared_memory(row):
    assert RATES.keys() == hardware.SHARED_MEMORY.keys() == DATA_SHEETS.keys() | {"interpreter"}
    rates = RATES[row]
    assert rates.flops_16_bit >= rates.flops_tf32 >= rates.flops_fp32 and rates.l2_bandwidth > rates.bandwidth


def test_the_plan_on_an_h100_is_that_of_the_measured_rates(present):
    present(H100)
    measured = device_rates.Rates(724e12, 393e12, 51e12, 2.4e12, 2.75e12, 132, 0.73, shared_memory=226 * KiB)
    assert rates_of_the_gpu() == measured


def choices(rates) -> list:
    chosen = [heuristics.choose_linear(call, rates) for heuristics in HEURISTICS for call in calls()]
    sddmms = [SDDMMCall(*call[:3], call.nnz, 0, call.element_size, call.tf32) for call in calls() if call.nnz]
    return chosen + [heuristics.choose_sddmm(call, rates) for heuristics in HEURISTICS for call in sddmms]


HEURISTICS = (triton_heuristics, cuda_heuristics)


def test_algorithms_differ_between_devices(present):
    """An H200 has more bandwidth than an H100, and an RTX 4090 less of all."""
    plans = []
    for device in (H100, H200, RTX_4090):
        present(device)
        plans.append(choices(rates_of_the_gpu()))
    assert plans[0] == choices(RATES["interpreter"]._replace(shared_memory=226 * KiB))
    assert plans[0] != plans[1] and plans[0] != plans[2]


@pytest.mark.parametrize(("device", "bandwidth"), [(H200, 4.8), (A100, 2.039), (MI300X, 5.3), (MI325X, 6.0)])
def test_memory_without_a_clock_goes_by_the_devices_name_or_its_architecture(present, device, bandwidth):
    present(without(device, "memory_clock_rate", "clock_rate"))
    sheet, row = DATA_SHEETS[hardware.architecture(GPU)], RATES[hardware.architecture(GPU)]
    rates = rates_of_the_gpu()
    assert rates.bandwidth == pytest.approx(row.bandwidth * bandwidth * TB / sheet.bandwidth)
    assert rates.flops_16_bit == row.flops_16_bit


def test_half_of_the_multiprocessors_of_a_device_without_clocks_have_half_of_everything(present):
    present(
        types.SimpleNamespace(**vars(without(A100, "memory_clock_rate", "clock_rate")) | {"multi_processor_count": 54})
    )
    half, whole = rates_of_the_gpu(), RATES["sm_80"]
    for rate in ("flops_16_bit", "flops_tf32", "flops_fp32", "bandwidth", "l2_bandwidth", "multiprocessors"):
        assert getattr(half, rate) == getattr(whole, rate) / 2


def test_a_geforce_halves_the_tensor_cores_alone(present):
    present(RTX_4090)
    geforce = rates_of_the_gpu()
    present(types.SimpleNamespace(**vars(RTX_4090) | {"name": "NVIDIA RTX"}))
    professional = rates_of_the_gpu()
    assert professional == geforce._replace(flops_16_bit=2 * geforce.flops_16_bit, flops_tf32=2 * geforce.flops_tf32)


@pytest.mark.parametrize(
    ("capability", "shared_KiB", "architecture"),
    [((8, 7), 163, "sm_80"), ((8, 8), 99, "sm_86"), ((11, 0), 227, "sm_103"), ((12, 1), 99, "sm_120"),
     ((13, 0), 99, "sm_120"), ((13, 0), 227, "sm_103"), ((14, 5), 400, "sm_103"), ((14, 5), 64, "other")],
)  # fmt: skip
def test_an_unknown_cuda_gpu_goes_by_one_that_asks_for_no_more_shared_memory(
    present, capability, shared_KiB, architecture
):
    present(nvidia("NVIDIA Next", capability, 200, 2500, 5000, 8192, shared_KiB))
    assert hardware.architecture(GPU) == architecture
    assert hardware.SHARED_MEMORY[architecture] <= shared_KiB * KiB
    rates = rates_of_the_gpu()
    assert rates.multiprocessors == 200 and hardware.memory_bandwidth(GPU) == 10.24 * TB
    assert choices(rates)


@pytest.mark.parametrize("arch", ["gfx908", "gfx1100", "gfx1250"])
def test_an_unknown_amd_gpu_goes_by_its_multiprocessors(present, arch):
    present(without(amd("AMD Radeon", arch, 120, 2400, 1249, 384, 64), "shared_memory_per_block"))
    assert hardware.architecture(GPU) == "other" and hardware.shared_memory(GPU) == 64 * KiB
    rates = rates_of_the_gpu()
    assert rates.multiprocessors == 120 and rates.bandwidth == pytest.approx(1.6 * TB)
    assert choices(rates)


@pytest.mark.parametrize(
    ("device", "precision"), [(MI250X, "ieee"), (MI300X, "tf32"), (MI355X, "ieee"), (B300, "tf32")]
)
def test_tf32_is_used_where_the_tensor_cores_have_it(present, tf32_wanted, device, precision):
    """AMD's CDNA 3 alone has it; CDNA 4 has dropped it."""
    present(device)
    x = types.SimpleNamespace(dtype=torch.float32, device=GPU)
    assert hardware.precision(x) == precision


def test_a_measured_rate_replaces_the_devices_own(present):
    present(H200)
    device_rates.use_table(GPU, {"rates": {"bandwidth": 4e12, "multiprocessors": 131}, "configs": {}})
    own = rates_of_the_gpu()
    assert (own.bandwidth, own.multiprocessors, own.flops_16_bit) == (4e12, 131, RATES["sm_90"].flops_16_bit)
