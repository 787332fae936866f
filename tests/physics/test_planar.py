"""Images on rings: turning is shifting, overlaps are those of pixels, and the peak is where the picture was turned to."""

import math

import pytest
import torch
from torch import Tensor

from cryorbit.groups.so2 import SO2
from cryorbit.physics.planar import PolarGrid, rotate_images

BOX = 32


def blobs(count: int, generator: torch.Generator) -> Tensor:
    """Sums of four wide Gaussians within half the box."""
    axis = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    at = 8 * torch.rand(count, 4, 2, 1, generator=generator, dtype=torch.float64) - 4
    wide = 2 + torch.rand(count, 4, 1, generator=generator, dtype=torch.float64)
    x, y = (torch.exp(-0.5 * ((axis - at[:, :, k]) / wide) ** 2) for k in range(2))
    return torch.einsum("nby,nbx->nyx", y, x)


def test_a_turn_is_a_shift_along_the_rings(generator):
    grid, images = PolarGrid(BOX), blobs(3, generator)
    step = 2 * math.pi / grid.angles
    polar = grid.sample(images)
    quarter = grid.sample(rotate_images(images, torch.full((3,), math.pi / 2)))
    torch.testing.assert_close(quarter, polar.roll(16, dims=-1), atol=1e-5, rtol=0)  # but for the rim
    turned = grid.sample(rotate_images(images, torch.full((3,), 5 * step)))
    assert float((turned - polar.roll(5, dims=-1)).abs().max()) < 0.04 * float(polar.abs().max())


def test_overlap_is_that_of_pixels_and_its_peak_the_turn(generator):
    grid, images = PolarGrid(BOX), blobs(4, generator)
    angles = SO2().random(4, generator).double()
    shown = rotate_images(images, angles)
    score = grid.overlap(grid.sample(shown), grid.sample(images))
    for j in (0, 9, 40):
        direct = (shown * rotate_images(images, grid.steps()[j].expand(4))).sum(dim=(1, 2))
        torch.testing.assert_close(score[:, j], direct, rtol=0.01, atol=0)
    assert float(SO2().distance(grid.peak(score), angles).max()) < math.radians(0.5)


def test_distance_is_that_of_pixels_and_never_negative(generator):
    grid, images = PolarGrid(BOX), blobs(4, generator)
    shown = rotate_images(images, grid.steps()[[3, 11, 30, 50]].double())
    found = grid.distance(shown, images)
    for j in (0, 20):
        direct = (shown - rotate_images(images, grid.steps()[j].expand(4).double())).square().sum(dim=(1, 2))
        torch.testing.assert_close(found[:, j], direct, rtol=0.05, atol=0)
    dot = torch.zeros(1, BOX, BOX, dtype=torch.float64)
    dot[0, BOX // 2, BOX // 2] = 1.0  # what rings sample worst
    itself = grid.distance(dot, dot)
    assert abs(float(itself[0, 0])) < 1e-12
    assert float(itself.min()) > -1e-12
    rough = torch.randn(4, BOX, BOX, generator=generator, dtype=torch.float64)
    assert float(grid.distance(rough, rough.flip(0)).min()) > 0
    corner = torch.zeros(1, BOX, BOX, dtype=torch.float64)
    corner[0, 0, 0] = 2.0
    torch.testing.assert_close(
        grid.distance(corner, 0 * corner), torch.full((1, grid.angles), 4.0, dtype=torch.float64)
    )


def test_sampling_and_overlaps_are_differentiable(generator):
    grid = PolarGrid(8, angles=8)
    images = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, grid.rings, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: grid.overlap(grid.sample(a), b), (images, other))


@pytest.mark.parametrize("best", [0, 3, 7])
def test_peak_of_a_parabola(best):
    grid = PolarGrid(8, angles=8)
    apart = (torch.arange(8.0) - (best + 0.25) + 4) % 8 - 4
    found = grid.peak(-apart.square()[None])
    assert float(SO2().distance(found, torch.tensor((best + 0.25) * math.pi / 4))) < 1e-5


def test_peak_among_angles_near_one():
    grid = PolarGrid(8, angles=8)
    assert grid.away(torch.tensor([1]))[0].tolist() == pytest.approx(
        [abs(k) * math.pi / 4 for k in (1, 0, 1, 2, 3, 4, 3, 2)]
    )
    score = torch.tensor([[0.0, 1.0, 4.0, 9.0, 0.0, 0.0, 2.0, 0.0]])
    near = grid.away(torch.tensor([6])) < 0.3 * math.pi  # 5, 6, 7
    assert float(grid.peak(score, near)) == pytest.approx(6 * math.pi / 4 - 2 * math.pi, abs=1e-5)
    edge = float(grid.peak(score, grid.away(torch.tensor([1])) < 0.3 * math.pi))  # 0, 1, 2, and still rising there
    assert edge == pytest.approx(2.5 * math.pi / 4, abs=1e-5)


def test_values_between_the_angles_of_a_grid():
    grid = PolarGrid(16, angles=8)
    values = torch.arange(8.0).expand(4, -1)
    step = 2 * math.pi / 8
    angles = torch.tensor([0.0, 2.25 * step, -0.5 * step, 8.0 * step])
    torch.testing.assert_close(grid.at(values, angles), torch.tensor([0.0, 2.25, 3.5, 0.0]), atol=1e-5, rtol=0)
    assert grid.nearest(torch.tensor([0.0, 2.3 * step, -0.4 * step, -1.2 * step])).tolist() == [0, 2, 0, 7]
