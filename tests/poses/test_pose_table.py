"""Continuous pose refinement on exact slices of a phantom."""

import pytest
import torch

from cryorbit.groups.so3 import distance, exp, random_rotations
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.slicing import SlicingGrid, slicing_grid
from cryorbit.poses.table import refine_poses

BOX = 24


@pytest.fixture(scope="module")
def grid() -> SlicingGrid:
    generator = torch.Generator().manual_seed(3)
    axis = torch.arange(BOX, dtype=torch.float32) - BOX // 2
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).flip(-1)
    volume = sum(
        (torch.rand(1, generator=generator) + 0.5)
        * torch.exp(-((x - 5 * torch.randn(3, generator=generator)) ** 2).sum(-1) / 6)
        for _ in range(12)
    )
    return slicing_grid(volume, 9.0)


def test_recovers_perturbed_poses_without_noise(grid, generator):
    disk = fourier_disk(BOX, 9.0)
    count = 40
    truth = random_rotations(count, generator)
    shifts = torch.randn(count, 2, generator=generator)
    ctf = 0.5 + torch.rand(count, len(disk), generator=generator)
    images = forward(grid, truth, shifts, disk, ctf)
    start = exp(torch.randn(count, 3, generator=generator) * 0.06) @ truth
    before = distance(start, truth)
    r, s, *_ = refine_poses(grid, images, ctf, disk.weight, start, torch.zeros(count, 2), disk, iterations=15)
    error = torch.rad2deg(distance(r, truth))
    assert float(torch.rad2deg(before).median()) > 4
    assert float(error.median()) < 0.05
    assert float((error < 0.5).float().mean()) > 0.9
    assert float((s - shifts).norm(dim=1).median()) < 0.01
    torch.testing.assert_close(r @ r.mT, torch.eye(3).expand_as(r), atol=1e-5, rtol=0)


def test_never_worse_than_the_start_and_arguments_untouched(grid, generator):
    disk = fourier_disk(BOX, 9.0)
    truth = random_rotations(20, generator)
    images = forward(grid, truth, None, disk, None)
    images = images + 5 * torch.complex(
        torch.randn(images.shape, generator=generator), torch.randn(images.shape, generator=generator)
    )
    start, shift = random_rotations(20, generator), torch.zeros(20, 2)
    kept = start.clone(), shift.clone(), images.clone()
    ctf = torch.ones(20, len(disk))
    _, _, before, _ = refine_poses(grid, images, ctf, disk.weight, start, shift, disk, iterations=0)
    _, _, after, _ = refine_poses(grid, images, ctf, disk.weight, start, shift, disk, iterations=4)
    assert (after <= before + 1e-9 * before).all()
    assert float((before - after).mean()) > 0
    for now, then in zip((start, shift, images), kept, strict=True):
        assert torch.equal(now, then)


def test_shifts_stay_when_not_fitted(grid, generator):
    disk = fourier_disk(BOX, 9.0)
    truth = random_rotations(6, generator)
    images = forward(grid, truth, torch.ones(6, 2), disk, None)
    start = exp(torch.randn(6, 3, generator=generator) * 0.05) @ truth
    shift = torch.full((6, 2), 0.25)
    r, s, *_ = refine_poses(grid, images, torch.ones(6, len(disk)), disk.weight, start, shift, disk, fit_shift=False)
    assert torch.equal(s, shift)
    assert not torch.equal(r, start)
