"""Rotation grids, the exponential map and geodesic distance."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.autograd import gradcheck

from cryorbit.groups import so3


@pytest.mark.parametrize("order", [0, 1, 2])
def test_grid_counts_and_spacing(order: int) -> None:
    grid = so3.healpix_grid(order)
    assert len(grid) == 72 * 8**order
    nearest = so3.distance(grid[:1].expand_as(grid[1:]), grid[1:]).min()
    assert 0.5 < float(nearest) / so3.grid_spacing(order) < 1.1


def test_every_rotation_is_near_the_grid(generator: torch.Generator) -> None:
    grid, sample = so3.healpix_grid(1), so3.random_rotations(500, generator)
    traces = torch.einsum("nij,gij->ng", sample, grid).max(dim=1).values
    worst = torch.acos(((traces.min() - 1) / 2).clamp(-1, 1))
    assert math.degrees(float(worst)) < 26  # 30 deg steps: covering radius 24.9 deg


def test_grid_averages_vanish_as_haar_does() -> None:
    """Degree 1 exactly; degree 2 to 1 % of its largest value at this order, HEALPix being no exact design."""
    grid = so3.healpix_grid(1).double()
    assert float(grid.mean(0).abs().max()) < 1e-6
    squares = torch.einsum("gij,gkl->ijkl", grid, grid) / len(grid)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(squares, torch.einsum("ik,jl->ijkl", eye, eye) / 3, atol=0.01, rtol=0)


def test_exp_and_log_invert_each_other(generator: torch.Generator) -> None:
    vectors = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) * torch.linspace(0, 3.1, 100, dtype=torch.float64)[:, None]
    torch.testing.assert_close(so3.log(so3.exp(vectors)), vectors, atol=1e-9, rtol=0)


def test_exp_has_gradients_at_zero_and_elsewhere() -> None:
    assert gradcheck(so3.exp, torch.tensor([[0.0, 0, 0], [0.3, -0.2, 0.9]], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1e-3, 0.0316, 0.0317, 1.0, 3.0, math.pi - 1e-6, math.pi, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_and_log_are_those_of_scipy(angle: float, dtype: torch.dtype, generator: torch.Generator) -> None:
    axes = torch.nn.functional.normalize(torch.randn(50, 3, generator=generator, dtype=torch.float64), dim=-1)
    vectors = (angle * torch.cat([axes, torch.eye(3).double(), -torch.eye(3).double()])).to(dtype)
    rotations, near = so3.exp(vectors), 20 * torch.finfo(dtype).eps
    expected = Rotation.from_rotvec(vectors.double().numpy())
    torch.testing.assert_close(rotations.double(), torch.from_numpy(expected.as_matrix()), atol=near, rtol=0)
    found = so3.log(rotations)
    torch.testing.assert_close(so3.exp(found), rotations, atol=near, rtol=0)
    assert float(found.norm(dim=-1).max()) <= math.pi + near
    if angle < math.pi - 1e-6:
        torch.testing.assert_close(found, vectors, atol=near, rtol=near)


def test_log_has_gradients_at_zero_and_elsewhere() -> None:
    vectors = torch.tensor([[0.0, 0, 0], [0.3, -0.2, 0.9], [1e-3, 0, 0], [0, 3.0, 0.1]], dtype=torch.float64)
    assert gradcheck(lambda v: so3.log(so3.exp(v)), vectors.requires_grad_())


def test_the_nearest_rotation_is_nearest(generator: torch.Generator) -> None:
    """Against rotations around it; of a reflection too."""
    matrices = torch.randn(20, 3, 3, generator=generator, dtype=torch.float64)
    found = so3.orthonormalise(matrices)
    torch.testing.assert_close(found @ found.mT, torch.eye(3, dtype=torch.float64).expand_as(found))
    assert float(torch.linalg.det(found).min()) > 0.999
    around = so3.exp(0.1 * torch.randn(200, 1, 3, generator=generator, dtype=torch.float64)) @ found
    assert bool(((around - matrices).norm(dim=(-1, -2)) > (found - matrices).norm(dim=(-1, -2))).all())


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-3, 1.0, math.pi - 1e-3, math.pi])
def test_distance_is_the_angle_of_the_rotation(angle: float) -> None:
    axis = torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
    found = so3.distance(so3.exp(angle * axis), torch.eye(3, dtype=torch.float64)[None])
    assert float(found) == pytest.approx(angle, abs=2e-7)


def test_random_rotations_are_rotations(generator: torch.Generator) -> None:
    r = so3.random_rotations(100, generator).double()
    torch.testing.assert_close(r @ r.mT, torch.eye(3, dtype=torch.float64).expand_as(r), atol=1e-6, rtol=0)
    assert float(torch.linalg.det(r).min()) > 0.999
