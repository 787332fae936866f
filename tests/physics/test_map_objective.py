"""The least-squares objective of posed images in the map: what its minimum is, and that it is the images' own."""

import pytest
import torch
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.physics.fourier import FourierDisk, fourier_disk
from cryorbit.physics.slicing import (
    Accumulator,
    insert_slices,
    misfit,
    slice_grid,
    slicing_grid,
    volume_from_accumulator,
)


def smooth_map(box: int, generator: torch.Generator) -> Tensor:
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    centres = 0.08 * box * torch.randn(25, 3, generator=generator, dtype=torch.float64)
    z, y, x = (torch.exp(-((axis - centres[:, i : i + 1]) ** 2) / 4.5) for i in range(3))
    return torch.einsum("nz,ny,nx->zyx", z, y, x)


def observed(
    box: int, count: int, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, FourierDisk]:
    """Noisy slices of a smooth map times a factor between -1 and 1 for each pixel; the factors, rotations, disk."""
    disk = fourier_disk(box, box // 2 - 1.0)
    rotations = so3.random_rotations(count, generator).double()
    clean = slice_grid(slicing_grid(smooth_map(box, generator), disk.radius, 3), rotations, disk)
    ctf = 2 * torch.rand(count, len(disk), generator=generator, dtype=torch.float64) - 1
    white = torch.randn(clean.shape, generator=generator, dtype=torch.complex128)
    return ctf * clean + noise * clean.abs().mean() * white, ctf, rotations, disk


def inserted(box: int, oversampling: int, generator: torch.Generator) -> Accumulator:
    images, ctf, rotations, disk = observed(box, 300, 1.0, generator)
    return insert_slices(ctf * images, ctf.square(), rotations, disk, oversampling)


def minimised(sums: Accumulator, prior: Tensor) -> Tensor:
    """Voxels by gradient descent (L-BFGS) on the objective, from nothing; over the B-spline's transform, which keeps steps in the band."""
    spline = (
        torch.sinc((torch.arange(sums.box, dtype=torch.float64) - sums.box // 2) / (sums.oversampling * sums.box)) ** 3
    )
    over = 1 / (spline[:, None, None] * spline[:, None] * spline)
    voxels = torch.zeros(sums.box, sums.box, sums.box, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [voxels], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = misfit(over * voxels, sums, prior)
        value.backward()
        return value

    optimiser.step(loss)
    return over * voxels.detach()


@pytest.mark.parametrize("box", [8, 9])
def test_minimum_over_voxels_is_the_closed_form(box: int, generator: torch.Generator) -> None:
    """Gradient descent on voxels from nothing; with as many voxels as grid points it can reach what the quotient reaches."""
    sums, prior = inserted(box, 1, generator), torch.linspace(0.5, 20.0, box, dtype=torch.float64)
    closed = volume_from_accumulator(sums, prior)
    assert float(misfit(torch.zeros_like(closed), sums, prior)) == pytest.approx(1.0)
    assert float(misfit(closed, sums, prior)) < 1e-12
    assert float((minimised(sums, prior) - closed).norm() / closed.norm()) < 1e-4
    without = volume_from_accumulator(sums, 0.0)  # the prior matters
    assert float((without - closed).norm() / closed.norm()) > 0.05


def test_twofold_grid_cut_to_the_box_is_near_the_minimum(generator: torch.Generator) -> None:
    """Where the grid has more points than the box voxels, the quotient is cut to the box: off the minimum, but not by much."""
    sums, prior = inserted(8, 2, generator), torch.full((8,), 5.0, dtype=torch.float64)
    closed = float(misfit(volume_from_accumulator(sums, prior), sums, prior))
    lowest = float(misfit(minimised(sums, prior), sums, prior))
    assert lowest < closed < lowest + 0.03


def test_objective_is_the_squared_error_of_the_images(generator: torch.Generator) -> None:
    """``sum |image - ctf slice|^2`` over all images, as a share of what an empty map leaves above the best one, for maps turned and moved."""
    box = 12
    images, ctf, rotations, disk = observed(box, 400, 0.1, generator)
    sums = insert_slices(ctf * images, ctf.square(), rotations, disk)

    def error(volume: Tensor) -> float:
        slices = slice_grid(slicing_grid(volume, disk.radius, 3), rotations, disk)
        return float((images - ctf * slices).abs().square().sum())

    best = volume_from_accumulator(sums, 1e-3)
    empty = torch.zeros_like(best)
    bottom = float(misfit(best, sums, 1e-3))
    for volume in (best.flip(0), best.flip(1), *(torch.roll(best, 1, axis) for axis in range(3))):
        share = (error(volume) - error(best)) / (error(empty) - error(best))
        assert share > 0.02
        assert (float(misfit(volume, sums, 1e-3)) - bottom) / (1 - bottom) == pytest.approx(share, rel=0.08)
