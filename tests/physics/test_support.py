"""The Gaussian of a map within a support, against dense matrices and the slices it stands for."""

import pytest
import torch

from cryorbit.errors import DataError
from cryorbit.groups.so3 import random_rotations
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.slicing import Accumulator, back_projected, insert_slices, slice_grid, slicing_grid
from cryorbit.physics.support import SupportedGaussian
from cryorbit.simulate.orientations import Orientations

BOX = 10


def inserted(box: int, views: int, kind: str = "uniform", oversampling: int = 4) -> Accumulator:
    generator, disk = torch.Generator().manual_seed(5), fourier_disk(box)
    rotations, ones = Orientations(kind).sample(views, generator), torch.ones(views, len(disk))
    return insert_slices(ones.to(torch.complex64), ones, rotations, disk, oversampling)


def white_noise(views: int, generator: torch.Generator) -> torch.Tensor:
    """Back-projected at the same views."""
    disk = fourier_disk(BOX)
    rotations = Orientations("uniform").sample(views, torch.Generator().manual_seed(5))
    values = torch.randn(views, len(disk), dtype=torch.complex64, generator=generator)
    return back_projected(insert_slices(values, torch.ones(views, len(disk)), rotations, disk))


@pytest.fixture(scope="module")
def small() -> tuple[SupportedGaussian, torch.Tensor]:
    """Some 80 voxels, and P as a matrix of them."""
    support = soft_sphere(BOX, 2.6, 0.0) > 0
    support[2:4, 5, 5] = True
    prior = torch.exp(-torch.arange(BOX // 2 + 1) / 2.0)
    found = SupportedGaussian.from_sums(inserted(BOX, 20), prior, support)
    places = torch.nonzero(support)
    columns = []
    for z, y, x in places:
        unit = torch.zeros(BOX, BOX, BOX)
        unit[z, y, x] = 1.0
        columns.append(found.times(unit)[support])
    return found, torch.stack(columns, dim=1).double()


def test_back_projection_is_the_adjoint_of_slicing():
    generator, disk = torch.Generator().manual_seed(0), fourier_disk(9, 3.0)
    volume = torch.randn(9, 9, 9, generator=generator, dtype=torch.float64)
    rotations = random_rotations(4, generator).double()
    values = torch.randn(4, len(disk), dtype=torch.complex128, generator=generator)
    slices = slice_grid(slicing_grid(volume, disk.radius), rotations, disk)
    forth = float((2 * (slices.conj() * values).real).sum())
    acc = insert_slices(values, torch.ones(4, len(disk), dtype=torch.float64), rotations, disk)
    assert forth == pytest.approx(float((volume * back_projected(acc)).sum()), rel=1e-9)


@pytest.mark.parametrize("kind", ["uniform", "preferred", "cone"])
def test_precision_is_what_slicing_and_inserting_do(kind):
    """To better than a thousandth over a support of three quarters of the box; weights on a twofold grid would be off by a hundredth."""
    box, views = 20, 300
    generator, disk = torch.Generator().manual_seed(5), fourier_disk(box)
    rotations = Orientations(kind).sample(views, generator)
    support = soft_sphere(box, 7.6, 0.0) > 0
    volume = torch.randn(box, box, box, generator=torch.Generator().manual_seed(1)) * support
    slices, ones = slice_grid(slicing_grid(volume, disk.radius, 4), rotations, disk), torch.ones(views, len(disk))
    expected = back_projected(insert_slices(slices, ones, rotations, disk, 4)) * support
    for oversampling, least, most in ((2, 5e-3, 3e-2), (4, 0.0, 1e-3)):
        acc = inserted(box, views, kind, oversampling)
        found = SupportedGaussian.from_sums(acc, torch.ones(box // 2 + 1), support)
        assert least < float((found.images_times(volume) - expected).norm() / expected.norm()) < most


def test_solution_and_draws_are_those_of_the_matrix(small):
    found, matrix = small
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-5 * float(matrix.max()))
    generator = torch.Generator().manual_seed(2)
    force = torch.randn(BOX, BOX, BOX, generator=generator) * found.support
    exact = torch.linalg.solve(matrix, force[found.support].double())
    off = found.solved(force)[found.support].double() - exact
    assert float(off @ matrix @ off) < 0.02 * len(
        off
    )  # a seventh of a standard deviation, were the preconditioner exact a fiftieth
    drawn = torch.stack([found.draw(white_noise(20, generator), generator) for _ in range(600)])
    assert float(drawn[:, ~found.support].abs().max()) == 0.0
    values = drawn[:, found.support].double()
    white = values @ torch.linalg.cholesky(matrix)
    covariance = white.T @ white / len(white)
    assert float(covariance.diagonal().mean()) == pytest.approx(1.0, abs=0.03)
    assert float((covariance - torch.eye(len(covariance))).square().mean().sqrt()) < 1.3 / len(white) ** 0.5


def test_non_negative_map_is_the_best_of_its_kind(small):
    """No voxel is negative, none that is free wants to move, none that is held wants to rise."""
    found, matrix = small
    force = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(3)) * found.support
    values = found.non_negative(force, found.solved(force))
    inside = values[found.support].double()
    assert float(inside.min()) == 0.0
    assert 0.2 < float((inside > 0).double().mean()) < 0.8
    push = force[found.support].double() - matrix @ inside
    scale = matrix.diagonal().sqrt()  # of the push of a voxel, a standard deviation
    assert float((push / scale)[inside > 0].abs().max()) < 0.1
    assert float((push / scale)[inside == 0].max()) < 0.1


def test_empty_support_is_refused():
    with pytest.raises(DataError, match="DATA233"):
        SupportedGaussian.from_sums(inserted(BOX, 5), torch.ones(6), torch.zeros(BOX, BOX, BOX, dtype=torch.bool))


def test_what_cannot_be_solved_is_refused(small):
    found, _ = small
    force = torch.full((BOX, BOX, BOX), torch.nan) * found.support
    with pytest.raises(DataError, match="DATA234"):
        found.solved(force)
    with pytest.raises(DataError, match="DATA235"):
        found.non_negative(force, force)
