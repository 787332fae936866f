"""The CTF against RELION's formula written independently, and shifts against blobs that move."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryorbit.physics.ctf import ctf, ctf_on_disk, wavelength
from cryorbit.physics.fourier import disk_to_images, fourier_disk
from cryorbit.physics.shift import phase_ramp
from cryorbit.types import CTFParams

FIELDS = list(CTFParams.__dataclass_fields__)
CASES = {
    "no astigmatism": (15000, 15000, 0, 0, 300, 2.7, 0.1, 0, 1),
    "astigmatism": (15000, 14500, 30, 0, 300, 2.7, 0.1, 0, 1),
    "200 kV": (15000, 14500, -75, 0, 200, 1.4, 0.07, 0, 1),
    "phase plate": (30000, 28000, 120, 90, 300, 2.7, 0.1, 0, 1),
    "all contrast": (5000, 5000, 0, 45, 300, 0.001, 0.5, 0, 1),
    "U below V": (8000, 9000, 30, 0, 300, 2.7, 0.1, 0, 1),
    "B-factor and scale": (12000, 11000, 10, 0, 300, 2.7, 0.1, 80, 0.7),
}


def relion(case: tuple[float, ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """RELION's ``CTF::getCTF`` with its defocus matrix, in numpy from the published formula."""
    u, v, angle, phase, kv, cs, q0, bfactor, scale = case
    volt = kv * 1e3
    lam = 12.2643247 / np.sqrt(volt * (1 + volt * 0.978466e-6))
    k1, k2 = np.pi * lam, np.pi / 2 * cs * 1e7 * lam**3
    k3, k4, k5 = np.arctan(q0 / np.sqrt(1 - q0**2)), -bfactor / 4, np.deg2rad(phase)
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    turn = np.array([[c, s], [-s, c]])
    a = turn.T @ np.diag([-u, -v]) @ turn
    s2 = x**2 + y**2
    gamma = k1 * (a[0, 0] * x * x + 2 * a[0, 1] * x * y + a[1, 1] * y * y) + k2 * s2**2 - k5 - k3
    return -np.sin(gamma) * np.exp(k4 * s2) * scale


def parameters(case: tuple[float, ...], dtype: torch.dtype = torch.float64) -> CTFParams:
    values = list(case)
    values[2], values[3] = math.radians(values[2]), math.radians(values[3])
    return CTFParams(*(torch.tensor([v], dtype=dtype) for v in values))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ctf_is_relions(case: tuple[float, ...]) -> None:
    axis = np.fft.fftfreq(64, 1.1)
    x, y = (v.ravel() for v in np.meshgrid(axis, axis))
    found = ctf(parameters(case), torch.from_numpy(np.stack([x, y], -1)))[0].numpy()
    np.testing.assert_allclose(found, relion(case, x, y), atol=1e-9)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_single_precision_is_enough(case: tuple[float, ...]) -> None:
    """Float32 at 3 um defocus and 2.2 A: phases of hundreds of radians lose digits, but stay below 1e-3."""
    disk = fourier_disk(128)
    single = ctf_on_disk(parameters(case, torch.float32), disk, 1.1)
    double = ctf_on_disk(parameters(case), disk, 1.1)
    assert float((single - double).abs().max()) < 1e-3


def test_wavelength_of_300_kv() -> None:
    assert float(wavelength(torch.tensor(300.0, dtype=torch.float64))) == pytest.approx(0.01968762, abs=2e-8)


@given(st.floats(0.0, 0.9), st.floats(1e3, 5e4), st.floats(0, 90))
@settings(max_examples=30, deadline=None)
def test_ctf_at_the_origin(q0: float, defocus: float, phase: float) -> None:
    """CTF(0) = sin(phase + asin(Q0)), which is +Q0 without a phase plate: RELION's sign."""
    case = (defocus, defocus, 0, phase, 300, 2.7, q0, 0, 1)
    value = float(ctf(parameters(case), torch.zeros(1, 2, dtype=torch.float64)))
    assert value == pytest.approx(math.sin(math.radians(phase) + math.asin(q0)), abs=1e-9)


def test_exchanging_u_and_v_is_a_quarter_turn() -> None:
    k = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    one = ctf(parameters((8000, 9000, 30, 0, 300, 2.7, 0.1, 0, 1)), k)
    other = ctf(parameters((9000, 8000, 120, 0, 300, 2.7, 0.1, 0, 1)), k)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [CASES["astigmatism"], CASES["U below V"], CASES["no astigmatism"]])
def test_ctf_gradients(case: tuple[float, ...]) -> None:
    """All nine parameters, each in a unit near one so that finite differences see it."""
    units = torch.tensor([1e3, 1e3, 1.0, 1.0, 1e2, 1.0, 0.1, 1e2, 1.0], dtype=torch.float64)
    start = torch.stack([getattr(parameters(case), name)[0] for name in FIELDS]) / units
    start[7] += 0.3
    k = torch.tensor([[0.0, 0.0], [0.03, 0.01], [-0.02, 0.06], [0.05, -0.05]], dtype=torch.float64)

    def value(vector: torch.Tensor) -> torch.Tensor:
        return ctf(CTFParams(*(vector * units)[:, None]), k)

    vector = start.requires_grad_()
    assert torch.autograd.gradcheck(value, vector)
    assert bool(torch.isfinite(torch.autograd.grad(value(vector).sum(), vector)[0]).all())


def blob(box: int, x: float, y: float, sigma: float = 2.0) -> torch.Tensor:
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    return torch.exp(-((axis - y)[:, None] ** 2 + (axis - x)[None] ** 2) / (2 * sigma**2))


def blob_on_disk(box: int) -> torch.Tensor:
    disk = fourier_disk(box)
    k2 = disk.k.double().square().sum(-1) / box**2
    return (2 * math.pi * 4.0 * torch.exp(-2 * math.pi**2 * 4.0 * k2)).to(torch.complex128)[None]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([32, 33]), st.floats(-6, 6), st.floats(-6, 6))
def test_a_shift_moves_a_blob_by_itself(box: int, x: float, y: float) -> None:
    """image(x) = P(x - s), also by fractions of a pixel: x is the column, y the row."""
    disk = fourier_disk(box)
    moved = blob_on_disk(box) * phase_ramp(torch.tensor([[x, y]], dtype=torch.float64), disk)
    torch.testing.assert_close(disk_to_images(moved, disk)[0], blob(box, x, y), atol=1e-4, rtol=0)


@given(st.lists(st.floats(-20, 20), min_size=4, max_size=4))
@settings(max_examples=20, deadline=None)
def test_shifts_compose(numbers: list[float]) -> None:
    disk = fourier_disk(16)
    a, b = torch.tensor(numbers, dtype=torch.float64).reshape(2, 1, 2)
    torch.testing.assert_close(phase_ramp(a, disk) * phase_ramp(b, disk), phase_ramp(a + b, disk), atol=1e-9, rtol=0)
    torch.testing.assert_close(phase_ramp(a, disk).abs(), torch.ones(1, len(disk)).double(), atol=1e-12, rtol=0)


def test_leading_dimensions_and_gradients_of_shifts() -> None:
    disk = fourier_disk(6)
    shifts = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert phase_ramp(shifts, disk).shape == (2, 3, len(disk))
    assert torch.autograd.gradcheck(lambda s: torch.view_as_real(phase_ramp(s, disk)), shifts)
