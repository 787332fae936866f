"""The measurement models one by one: closed forms, the order of factors, gradients in every parameter."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cryorbit.errors import ConfigError
from cryorbit.groups.cyclic import Cyclic
from cryorbit.groups.so3 import exp, random_rotations
from cryorbit.physics.cryoem import CryoEM, form_images, forward
from cryorbit.physics.ctf import ctf, ctf_on_disk
from cryorbit.physics.fourier import disk_to_images, fourier_disk
from cryorbit.physics.mra import MRA
from cryorbit.physics.planar import Planar, rotate_images
from cryorbit.physics.slicing import project, slice_grid, slicing_grid
from cryorbit.types import CTFParams
from cryorbit.volumes.voxel import VoxelVolume


def _ctf_params(n: int = 2, dtype: torch.dtype = torch.float64) -> CTFParams:
    step = torch.arange(n, dtype=dtype)
    return CTFParams(
        defocus_u=15000 + 700 * step,
        defocus_v=14000 + 900 * step,
        defocus_angle=0.3 + step,
        phase_shift=0.1 * step,
        voltage=300 - 100 * step,
        spherical_aberration=2.7 - 0.7 * step,
        amplitude_contrast=0.1 - 0.03 * step,
        bfactor=20 + step,
        scale=1 - 0.1 * step,
    )


def _map(box: int) -> Tensor:
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.exp(-((x - 1) ** 2 + (y + 0.5) ** 2 + z**2) / 4)


# --- multi-reference alignment ---


def test_mra_moves_towards_larger_indices() -> None:
    signal = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = MRA(Cyclic(4)).observe(signal, torch.tensor([0, 1, 3]))
    torch.testing.assert_close(rows, torch.tensor([[1.0, 2, 3, 4], [4.0, 1, 2, 3], [2.0, 3, 4, 1]]))


def test_mra_second_moment_is_the_autocorrelation(generator: torch.Generator) -> None:
    """Uniform shifts: ``E[y_i y_j]`` is the circular autocorrelation at lag i - j over n (papers/003 section 3.1)."""
    n = 9
    signal = torch.randn(n, generator=generator, dtype=torch.float64)
    model = MRA(Cyclic(n))
    shifts, weights = model.group.quadrature(n)
    rows = model.observe(signal, shifts)
    moment = torch.einsum("g,gi,gj->ij", weights.double(), rows, rows)
    lag = (torch.arange(n)[:, None] - torch.arange(n)) % n
    correlation = torch.stack([(signal * signal.roll(-m)).sum() for m in range(n)]) / n
    torch.testing.assert_close(moment, correlation[lag], atol=1e-7, rtol=0)


@pytest.mark.parametrize("order", [0, -3])
def test_empty_cyclic_group_is_refused(order: int) -> None:
    with pytest.raises(ConfigError, match="CONF111"):
        Cyclic(order)


# --- planar rotation ---


@pytest.mark.parametrize("box", [32, 33])
def test_planar_rotation_of_a_gaussian(box: int) -> None:
    """A blob at (5, 0) turned by t lands at 5 (cos t, sin t), to 2 % of its height."""
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angles = torch.tensor([0.0, 0.4, math.pi / 2, 2.0, -2.9], dtype=torch.float64)
    blob = torch.exp(-((x - 5) ** 2 + y**2) / (2 * 2.0**2))
    found = Planar().observe(blob, angles).reshape(5, box, box)
    for image, t in zip(found, angles.tolist(), strict=True):
        expected = torch.exp(-((x - 5 * math.cos(t)) ** 2 + (y - 5 * math.sin(t)) ** 2) / (2 * 2.0**2))
        assert float((image - expected).abs().max()) < 0.02


def test_planar_rotation_fills_with_zero() -> None:
    turned = rotate_images(torch.ones(1, 16, 16), torch.tensor([math.pi / 4]))[0]
    assert float(turned[0, 0]) == 0
    assert float(turned[8, 8]) == pytest.approx(1)


# --- cryo-EM ---


@pytest.mark.parametrize("box", [12, 13])
def test_forward_is_ctf_times_shift_times_slice(box: int, generator: torch.Generator) -> None:
    disk = fourier_disk(box)
    grid = slicing_grid(_map(box), disk.radius)
    rotations = random_rotations(2, generator).double()
    shifts = torch.tensor([[1.5, -2.0], [0.0, 0.25]], dtype=torch.float64)
    contrast = ctf_on_disk(_ctf_params(), disk, 2.0)
    slices = slice_grid(grid, rotations, disk)
    k = torch.stack([disk.kx, disk.ky], dim=-1).double()
    ramp = torch.exp(-2j * math.pi / box * (shifts @ k.T))
    torch.testing.assert_close(forward(grid, rotations, shifts, disk, contrast), contrast * ramp * slices)
    torch.testing.assert_close(forward(grid, rotations, None, disk, contrast), contrast * slices)
    torch.testing.assert_close(forward(grid, rotations, shifts, disk, None), ramp * slices)
    torch.testing.assert_close(forward(grid, rotations, None, disk, None), slices)
    torch.testing.assert_close(form_images(slices, shifts, disk, contrast), contrast * ramp * slices)


def test_forward_without_ctf_is_a_rolled_projection(generator: torch.Generator) -> None:
    disk = fourier_disk(12)
    rotations = random_rotations(1, generator).double()
    grid = slicing_grid(_map(12), disk.radius)
    moved = disk_to_images(forward(grid, rotations, torch.tensor([[2.0, -1.0]]).double(), disk, None), disk)
    torch.testing.assert_close(moved, project(_map(12), rotations).roll((-1, 2), dims=(-2, -1)), atol=1e-10, rtol=0)


def test_orbit_model_and_volume_agree_with_forward(generator: torch.Generator) -> None:
    disk = fourier_disk(12)
    rotations = random_rotations(3, generator).double()
    observed = CryoEM(disk).observe(VoxelVolume.from_map(_map(12)), rotations)
    expected = forward(slicing_grid(_map(12), disk.radius), rotations, None, disk, None)
    torch.testing.assert_close(observed.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_keeps_the_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    disk = fourier_disk(12)
    grid = slicing_grid(_map(12).to(dtype), disk.radius)
    contrast = ctf_on_disk(_ctf_params(1, dtype), disk, 2.0)
    out = forward(grid, random_rotations(1, generator).to(dtype), torch.zeros(1, 2, dtype=dtype), disk, contrast)
    assert out.dtype == (torch.complex64 if dtype == torch.float32 else torch.complex128)


def test_gradcheck_of_the_whole_forward_model(generator: torch.Generator) -> None:
    """In a turn of the pose, the shift, the defocus and the CTF scale at once."""
    disk = fourier_disk(8, 3.0)
    grid = slicing_grid(_map(8), disk.radius)
    rotation = random_rotations(1, generator).double()
    base = _ctf_params(1)

    def predict(turn: Tensor, shift: Tensor, defocus: Tensor, scale: Tensor) -> Tensor:
        params = replace(base, defocus_u=1e4 * defocus[:1], defocus_v=1e4 * defocus[1:], scale=scale)
        contrast = ctf_on_disk(params, disk, 3.0)
        return torch.view_as_real(forward(grid, exp(turn) @ rotation, shift, disk, contrast))

    values = ([[0.0, 0, 0]], [[0.4, -1.2]], [1.5, 1.4], [0.9])
    assert gradcheck(predict, tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values))


# --- CTF ---


def test_ctf_gradcheck_in_every_parameter() -> None:
    """Each parameter in a unit of its own size, so that finite differences are meaningful."""
    base, s = _ctf_params(1), torch.tensor([[0.03, 0.05], [-0.1, 0.08], [0.0, 0.0]], dtype=torch.float64)
    for field in fields(CTFParams):
        unit = {"defocus_u": 1e4, "defocus_v": 1e4, "voltage": 100.0, "bfactor": 10.0}.get(field.name, 1.0)

        def value(x: Tensor, name: str = field.name, unit: float = unit) -> Tensor:
            return ctf(replace(base, **{name: unit * x}), s)

        start = (getattr(base, field.name) / unit).clone().requires_grad_()
        assert gradcheck(value, (start,)), field.name


@pytest.mark.parametrize(("u", "v"), [(15000.0, 15000.0), (12000.0, 15000.0), (0.0, 0.0)])
def test_ctf_and_gradients_are_finite_for_any_astigmatism(u: float, v: float) -> None:
    params = replace(
        _ctf_params(1),
        defocus_u=torch.tensor([u], dtype=torch.float64, requires_grad=True),
        defocus_v=torch.tensor([v], dtype=torch.float64, requires_grad=True),
    )
    out = ctf(params, torch.tensor([[0.0, 0.0], [0.1, 0.02]], dtype=torch.float64))
    out.sum().backward()
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(params.defocus_u.grad).all())
    assert bool(torch.isfinite(params.defocus_v.grad).all())


def test_swapping_u_and_v_is_a_quarter_turn_of_the_angle() -> None:
    s = torch.tensor([[0.03, 0.05], [-0.1, 0.08]], dtype=torch.float64)
    base = _ctf_params()
    swapped = replace(
        base, defocus_u=base.defocus_v, defocus_v=base.defocus_u, defocus_angle=base.defocus_angle + math.pi / 2
    )
    torch.testing.assert_close(ctf(swapped, s), ctf(base, s))


def test_bfactor_and_scale_are_an_envelope() -> None:
    s = torch.tensor([[0.1, 0.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    base = replace(_ctf_params(1), bfactor=0 * one, scale=one)
    damped = replace(base, bfactor=base.bfactor + 80, scale=base.scale * 0.5)
    assert float(ctf(damped, s) / ctf(base, s)) == pytest.approx(0.5 * math.exp(-80 * 0.01 / 4))
