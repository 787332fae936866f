"""Wigner matrices, turned and mirrored ball maps, and the search over rotations and hands."""

import numpy as np
import pytest
import torch

from cryorbit.groups import so3
from cryorbit.volumes.ball import BallBasis, BallSlices
from cryorbit.volumes.ball_match import BallMatch, turned, wigner

BASIS = BallBasis(20, 9.0, 4, 4)


@pytest.fixture(scope="module")
def match():
    return BallMatch(BASIS, order=1, degree=3)


@pytest.fixture
def maps(generator):
    coefficients = torch.randn(6, len(BASIS), generator=generator)
    return coefficients / (1 + BASIS.layout[:, 0].float())


def test_wigner_matrices_are_a_representation(generator):
    a, b = so3.random_rotations(2, generator).double()
    for first, second, both in zip(*(wigner(3, r[None]) for r in (a, b, a @ b)), strict=True):
        torch.testing.assert_close(first[0] @ second[0], both[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(first[0] @ first[0].mT, torch.eye(len(first[0])), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_turned_map_has_the_values_of_the_map_at_turned_points(maps, generator, mirrored):
    rotation = so3.random_rotations(1, generator)[0]
    points = np.random.default_rng(0).normal(size=(30, 3)) * 3
    there = BASIS.values((points @ rotation.double().numpy()) * (-1 if mirrored else 1))
    here = BASIS.values(points)
    found = turned(BASIS, maps, rotation, mirrored)
    torch.testing.assert_close(found.double() @ here.mT, maps.double() @ there.mT, atol=1e-5, rtol=1e-4)


def test_a_turned_and_mirrored_map_is_found_again(maps, match, generator):
    rotations = so3.random_rotations(len(maps), generator)
    moved = torch.cat(
        [turned(BASIS, a[None], r, i % 2 == 0) for i, (a, r) in enumerate(zip(maps, rotations, strict=True))]
    )
    assert float(match.mismatch(moved, maps).max()) < 0.03  # the finest step of order 1 is 7.5 degrees
    assert float(match.mismatch(moved, maps.roll(1, dims=0)).min()) > 0.2
    laid = match.laid(maps, moved)
    torch.testing.assert_close(laid.norm(dim=1), maps.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_mismatch_does_not_see_scale_and_has_the_gradient_at_its_rotation(maps, match):
    other = maps.roll(1, dims=0)
    torch.testing.assert_close(match.mismatch(3 * maps, other), match.mismatch(maps, 0.5 * other), atol=1e-5, rtol=0)
    found = maps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(match.mismatch(found, other).sum(), found)
    laid = match.laid(other, maps)
    step = 1e-2 * laid
    change = match.mismatch(maps + step, other) - match.mismatch(maps, other)
    torch.testing.assert_close(change, (gradient * step).sum(dim=1), rtol=0.05, atol=1e-4)
    assert bool((change < 0).all())


def test_slices_of_a_batch_are_those_of_each_map(maps):
    slices = BallSlices(BASIS, so3.healpix_grid(0)[::6].double(), 4, 5)
    each = torch.stack([slices(a) for a in maps])
    torch.testing.assert_close(slices.batch(maps), each.transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_wavenumbers_are_those_of_the_laplacian():
    """By differences at points of the ball."""
    points = np.random.default_rng(1).normal(size=(20, 3)) * 2 + 0.5
    step = 0.02
    around = [BASIS.values(points + step * s * np.eye(3)[i]) for i in range(3) for s in (1, -1)]
    values = BASIS.values(points)
    laplacian = (sum(around) - 6 * values) / step**2
    torch.testing.assert_close(laplacian, -BASIS.wavenumbers.square() * values, atol=2e-5, rtol=1e-3)
