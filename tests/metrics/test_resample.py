"""Moved maps against the same atoms drawn where they were moved to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cryorbit.groups.so3 import random_rotations
from cryorbit.metrics.resample import move_volume, oversample, spectrum
from cryorbit.physics.fourier import volume_to_fourier


@pytest.mark.parametrize("box", [40, 41])
@pytest.mark.parametrize("mirrored", [False, True])
def test_moved_map_equals_moved_atoms(
    box: int, mirrored: bool, generator: torch.Generator, atoms: Tensor, draw_atoms: Callable[..., Tensor]
) -> None:
    rotation, shift = random_rotations(1, generator)[0].double(), torch.tensor([0.8, -1.3, 2.1], dtype=torch.float64)
    atoms = 0.6 * atoms
    volume = draw_atoms(atoms, box)
    expected = draw_atoms((-atoms if mirrored else atoms) @ rotation.T + shift, box)
    moved = move_volume(volume, rotation, shift, mirrored)
    assert float((moved - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("box", [24, 25])
def test_oversampling_keeps_the_samples(box: int, atoms: Tensor, draw_atoms: Callable[..., Tensor]) -> None:
    volume = draw_atoms(atoms * 0.3, box, sigma=2.0)
    fine = oversample(volume, 2)
    start = box - 2 * (box // 2)  # the centre of the fine grid lies on a sample of the coarse one
    kept = fine[start::2, start::2, start::2]
    torch.testing.assert_close(kept, volume, atol=2e-4, rtol=0)


def _exact(volume: Tensor, point: tuple[float, float, float]) -> complex:
    """The defining sum of the centred transform at (x, y, z) Fourier pixels."""
    box = volume.shape[-1]
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    wave = [torch.exp(-2j * torch.pi * p * axis / box) for p in point]
    return complex(torch.einsum("zyx,x,y,z->", volume.to(torch.complex128), *wave))


@pytest.mark.parametrize("box", [24, 25])
def test_spectrum_equals_the_defining_sum_anywhere(box: int, atoms: Tensor, draw_atoms: Callable[..., Tensor]) -> None:
    volume = draw_atoms(atoms * 0.4, box)
    points = [
        (1.0, 2.0, 3.0),
        (0.0, -4.0, 5.0),
        (-3.2, 1.3, -2.7),
        (0.0, 0.0, 0.0),
        (0.4, 7.3, -1.6),
        (-7.9, 0.0, 0.25),
    ]
    exact = torch.tensor([_exact(volume, p) for p in points])
    found = spectrum(volume, 8).at(torch.tensor(points))
    assert float((found - exact).abs().max() / exact.abs().max()) < 0.04  # linear interpolation


@pytest.mark.parametrize("box", [24, 25])
def test_spectrum_on_the_grid_equals_the_transform(box: int, atoms: Tensor, draw_atoms: Callable[..., Tensor]) -> None:
    volume = draw_atoms(atoms * 0.4, box)
    transform = volume_to_fourier(volume)
    assert _exact(volume, (1.0, 2.0, -3.0)) == pytest.approx(complex(transform[-3, 2, 1]), abs=1e-3)
