"""Projectors against the exact transform of Gaussian atoms: real space, NUFFT, Fourier slices at their stated error."""

import math
import sys

import pytest
import torch

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups import so3
from cryorbit.physics.fourier import FourierDisk, fourier_disk, images_to_disk
from cryorbit.physics.nufft import slice_nufft
from cryorbit.physics.realspace import project_realspace, rotate_volume
from cryorbit.physics.slicing import slice_grid, slicing_grid

SIGMA = 1.5
BOXES = pytest.mark.parametrize("box", [32, 33])


def _atoms(box: int, generator: torch.Generator) -> torch.Tensor:
    """Positions (30, 3) of a globular molecule whose farthest atom is 0.3 box from the centre."""
    atoms = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    return atoms * (0.3 * box / float(atoms.norm(dim=1).max()))


def _map(atoms: torch.Tensor, box: int) -> torch.Tensor:
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    scale = 1 / (SIGMA * math.sqrt(2 * math.pi))
    x, y, z = (scale * torch.exp(-((axis - atoms[:, i : i + 1]) ** 2) / (2 * SIGMA**2)) for i in range(3))
    return torch.einsum("nz,ny,nx->zyx", z, y, x)


def _exact(atoms: torch.Tensor, rotations: torch.Tensor, disk: FourierDisk) -> torch.Tensor:
    k = disk.k.double()
    envelope = torch.exp(-2 * math.pi**2 * SIGMA**2 * k.square().sum(1) / disk.box**2)
    phase = torch.einsum("pi,bni->bpn", k, (atoms @ rotations.mT)[..., :2]) * (-2 * math.pi / disk.box)
    return envelope * torch.polar(torch.ones_like(phase), phase).sum(-1)


def _error(found: torch.Tensor, expected: torch.Tensor, disk: FourierDisk) -> float:
    inside = disk.k_norm <= 0.8 * disk.box / 2
    return float((found - expected)[:, inside].norm() / expected[:, inside].norm())


@BOXES
@pytest.mark.parametrize(("oversampling", "limit"), [(1, 1.3e-2), (2, 1e-3), (3, 3e-4)])  # 0.94, 0.074, 0.021 %
def test_slices_against_gaussian_atoms(box: int, oversampling: int, limit: float, generator: torch.Generator) -> None:
    atoms, disk = _atoms(box, generator), fourier_disk(box)
    rotations = so3.random_rotations(8, generator).double()
    found = slice_grid(slicing_grid(_map(atoms, box), box / 2, oversampling), rotations, disk)
    assert _error(found, _exact(atoms, rotations, disk), disk) < limit


@BOXES
def test_nufft_against_gaussian_atoms(box: int, generator: torch.Generator) -> None:
    pytest.importorskip("pytorch_finufft")
    atoms, disk = _atoms(box, generator), fourier_disk(box)
    rotations = so3.random_rotations(4, generator).double()
    found = slice_nufft(_map(atoms, box), rotations, disk, tolerance=1e-9)
    assert _error(found, _exact(atoms, rotations, disk), disk) < 1e-4


@BOXES
def test_slices_against_nufft_off_the_molecule(box: int, generator: torch.Generator) -> None:
    """White noise in a ball of 0.3 box: no help from a falling spectrum."""
    pytest.importorskip("pytorch_finufft")
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    ball = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < (0.3 * box) ** 2
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64) * ball
    disk, rotations = fourier_disk(box), so3.random_rotations(4, generator).double()
    expected = slice_nufft(volume, rotations, disk, tolerance=1e-9)
    for oversampling, limit in ((2, 3e-3), (3, 9e-4)):  # measured 0.23, 0.062 %
        found = slice_grid(slicing_grid(volume, box / 2, oversampling), rotations, disk)
        assert _error(found, expected, disk) < limit


@BOXES
def test_rotation_gradient_against_nufft(box: int, generator: torch.Generator) -> None:
    pytest.importorskip("pytorch_finufft")
    atoms, disk = _atoms(box, generator), fourier_disk(box, 0.3 * box)
    volume = _map(atoms, box)
    rotations = so3.random_rotations(4, generator).double()
    target = _exact(atoms, rotations.flip(0), disk)

    def slope(kind: str) -> torch.Tensor:
        omega = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
        turned = so3.exp(omega) @ rotations
        if kind == "nufft":
            found = slice_nufft(volume, turned, disk, tolerance=1e-9)
        else:
            found = slice_grid(slicing_grid(volume, disk.radius), turned, disk)
        (gradient,) = torch.autograd.grad((found - target).abs().square().sum(), omega)
        return gradient

    exact, ours = slope("nufft"), slope("slices")
    assert float((ours - exact).norm() / exact.norm()) < 2e-3  # measured 1.4e-3


@BOXES
def test_realspace_projector_agrees(box: int, generator: torch.Generator) -> None:
    atoms, disk = _atoms(box, generator), fourier_disk(box)
    rotations = so3.random_rotations(4, generator).double()
    found = images_to_disk(project_realspace(_map(atoms, box), rotations), disk)
    assert _error(found, _exact(atoms, rotations, disk), disk) < 0.1
    eye = torch.eye(3, dtype=torch.float64)[None]
    flat = images_to_disk(project_realspace(_map(atoms, box), eye), disk)
    assert _error(flat, _exact(atoms, eye, disk), disk) < 1e-4


def test_realspace_gradcheck_and_turning(generator: torch.Generator) -> None:
    volume = torch.randn(5, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    rotations = so3.random_rotations(2, generator).double().requires_grad_()
    assert torch.autograd.gradcheck(project_realspace, (volume, rotations))
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    turned = rotate_volume(volume.detach(), quarter)
    torch.testing.assert_close(turned, torch.rot90(volume.detach(), 1, dims=(2, 1)))  # x to y
    assert project_realspace(volume, rotations[:0]).shape == (0, 5, 5)
    with pytest.raises(DataError, match="DATA110"):
        rotate_volume(torch.zeros(1, 1, 1), torch.eye(3))


def test_nufft_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_finufft", None)
    monkeypatch.setitem(sys.modules, "pytorch_finufft.functional", None)
    with pytest.raises(ConfigError, match="CONF110") as caught:
        slice_nufft(torch.zeros(8, 8, 8), torch.eye(3)[None], fourier_disk(8))
    assert "pip install" in caught.value.hint
