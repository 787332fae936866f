"""Parametrisations of rotations, what an encoder sees, its candidates, and the density they are fitted by."""

import math

import numpy as np
import pytest
import torch

from cryorbit.conventions import euler_to_matrix
from cryorbit.errors import ConfigError
from cryorbit.groups import so3
from cryorbit.groups.point import point_group
from cryorbit.networks.cnn import ConvEncoder
from cryorbit.networks.polar import RingEncoder
from cryorbit.physics.copies import Copies
from cryorbit.physics.fourier import disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.poses.density import cosines, drawn, log_concentrated, log_mixture
from cryorbit.poses.encoder import PARAMETRISATIONS, EncodedPoses, PoseEncoder, View, euler_rotations, rotations_of

SINGULAR = {
    "euler": [[0.0, 0.0, 0.0], [0.3, math.pi, -0.2]],
    "quaternion": [[0.0, 0.0, 0.0], [1e4, -1e4, 3e4], [1.0, 0.0, 0.0]],
    "s2s2": [
        [0.0] * 6,
        [1.0, 2.0, 3.0, 2.0, 4.0, 6.0],
        [1.0, 0.0, 0.0, -1.0, 0.0, 0.0],
        [1e-9, 0.0, 0.0, 0.0, 1e-9, 0.0],
        [1e6, 1.0, 0.0, 1e6, 0.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
    ],
}


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_every_output_is_a_rotation_with_finite_gradients_even_where_it_is_singular(name, generator):
    generic = torch.randn(50, PARAMETRISATIONS[name], generator=generator)
    x = torch.cat([generic, torch.tensor(SINGULAR[name])]).requires_grad_()
    r = rotations_of(name, x)
    torch.testing.assert_close(r @ r.mT, torch.eye(3).expand_as(r), atol=1e-5, rtol=0)
    assert (torch.linalg.det(r) > 0.99).all()
    (r * torch.randn(r.shape, generator=generator)).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[:50].norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_gradients_are_the_derivatives(name, generator):
    x = torch.randn(4, PARAMETRISATIONS[name], generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: rotations_of(name, y), (x,))


@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_every_rotation_is_reached(name, generator):
    """Gradient descent from several starts comes to given rotations."""
    wanted = so3.random_rotations(20, generator)
    best = torch.full((20,), math.inf)
    for _ in range(6):
        x = torch.randn(20, PARAMETRISATIONS[name], generator=generator).requires_grad_()
        optimiser = torch.optim.Adam([x], lr=0.2)
        for _ in range(80):
            optimiser.zero_grad()
            (rotations_of(name, x) - wanted).square().sum().backward()
            optimiser.step()
        best = torch.minimum(best, so3.distance(rotations_of(name, x), wanted).detach())
    assert float(torch.rad2deg(best).max()) < 3.0


def test_euler_angles_are_those_of_relion(generator):
    angles = 2 * math.pi * torch.rand(10, 3, generator=generator, dtype=torch.float64)
    expected = torch.from_numpy(euler_to_matrix(np.rad2deg(angles.numpy())))
    torch.testing.assert_close(euler_rotations(angles), expected)


def test_s2s2_turns_with_the_image(generator):
    """Turning the two vectors in their plane turns the image: the pose is multiplied from the left."""
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    turn = so3.exp(torch.tensor([0.0, 0.0, 0.7], dtype=torch.float64))
    r = rotations_of("s2s2", x)
    turned = (turn[:2, :2] @ r[:, :2]).flatten(1)
    torch.testing.assert_close(rotations_of("s2s2", turned), turn @ r)


def test_unknown_parametrisation_is_refused():
    with pytest.raises(ConfigError, match="known: euler, quaternion, s2s2"):
        rotations_of("axis", torch.zeros(1, 3))
    with pytest.raises(ConfigError, match="CONF500"):
        ConvEncoder(7, 3)
    with pytest.raises(ConfigError, match="CONF500"):
        RingEncoder(15, 3)


@pytest.mark.parametrize("box", [40, 41])
def test_view_shows_the_middle_of_the_image_at_the_pixels_asked_for(box, generator):
    disk = fourier_disk(box)
    view = View.around(disk, 16, 20.0)
    assert (view.box, view.side) == (round(16 * box / 25), 16)
    axis = torch.arange(box, dtype=torch.float32) - box // 2
    blob = torch.exp(-((axis[:, None] - 3) ** 2 + (axis + 2) ** 2) / 18)
    values = images_to_disk(blob[None], disk)
    shown = view(values[:, view.columns(disk)])[0]
    at = torch.nonzero(shown == shown.max())[0] - 8
    assert (at * (box / view.box) - torch.tensor([3.0, -2.0])).abs().max() < 0.5 * box / view.box + 1e-4
    assert shown.max() == pytest.approx(view.box * float(blob.max()) * (box / view.box) ** 2, rel=0.02)


def test_view_of_a_whole_image_is_the_image():
    disk = fourier_disk(16)
    view = View.around(disk, 16, math.inf)
    generator = torch.Generator().manual_seed(0)
    values = images_to_disk(torch.randn(2, 16, 16, generator=generator), disk)[:, view.columns(disk)]
    torch.testing.assert_close(view(values), 16 * disk_to_images(values, view.disk))


def encoder(**settings: object) -> PoseEncoder:
    return PoseEncoder(View.around(fourier_disk(24), 16, 14.0), heads=3, **settings)


def test_candidates_are_poses_with_weights_that_sum_to_one(generator):
    network = encoder()
    values = torch.randn(5, len(network.view.disk), generator=generator, dtype=torch.complex64)
    found = network(values)
    assert found.rotations.shape == (5, 3, 3, 3)
    torch.testing.assert_close(found.log_weight.exp().sum(dim=1), torch.ones(5))
    assert (found.concentration > 0).all()
    rotations, shifts = found.best()
    row = found.log_weight.argmax(dim=1)
    assert torch.equal(rotations[2], found.rotations[2, row[2]])
    assert torch.equal(shifts[2], found.shifts[2, row[2]])
    assert not encoder(fit_shift=False)(values).shifts.any()


@torch.no_grad()
def test_polar_candidates_turn_with_the_image(generator):
    """By a quarter exactly, which is two of eight directions; by an eighth as far as rings can be sampled."""
    disk = fourier_disk(24)
    network = PoseEncoder(View.around(disk, 24, math.inf), heads=3, polar=True).eval()
    seen = network.view.columns(disk)
    copies = Copies.of("c4", disk)
    values = torch.randn(5, len(disk), generator=generator, dtype=torch.complex64) * torch.exp(-0.1 * disk.k_norm**2)
    found = network(values[:, seen])
    assert found.rotations.shape == (5, 24, 3, 3)
    turned = network(copies.images(values, torch.ones(5, dtype=torch.int64))[:, seen])
    back = copies.back(turned.rotations, turned.shifts, torch.ones(5, dtype=torch.int64))
    for mine, theirs in zip((found.rotations, found.shifts, found.log_weight), (*back, turned.log_weight), strict=True):
        torch.testing.assert_close(theirs.roll(-6, dims=1), mine, atol=2e-4, rtol=1e-3)
    assert so3.distance(found.rotations[:, :3], found.rotations[:, 3:6]).min() > 0.01

    blob = torch.exp(-((torch.arange(24) - 12.0) ** 2) / 8)
    turn = network.turns[1]
    grid = slicing_grid(torch.einsum("i,j,k->ijk", blob, blob.roll(3), blob.roll(-2)), 12.0)
    pose = so3.random_rotations(4, generator)
    one, other = (network(slice_grid(grid, r, disk)[:, seen]) for r in (pose, turn @ pose))
    expected = (turn @ one.rotations).roll(3, dims=1)
    assert float(so3.distance(other.rotations, expected).median()) < 0.2 * float(
        so3.distance(other.rotations, one.rotations).median()
    )


def test_seed_decides_the_start_and_nothing_else_is_touched():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, same, other = encoder(seed=3), encoder(seed=3), encoder(seed=4)
    assert torch.equal(torch.rand(1), expected)
    weights = [next(e.parameters()) for e in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("concentration", [0.1, 3.0, 400.0])
def test_density_on_rotations_integrates_to_one(concentration):
    """Over the angle, whose density under the uniform distribution is (1 - cos) / pi."""
    angle = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)
    density = log_concentrated(angle.cos(), torch.full_like(angle, concentration)).exp() * (1 - angle.cos()) / math.pi
    assert float(torch.trapezoid(density, angle)) == pytest.approx(1.0, abs=1e-4)


def test_concentration_is_one_over_the_variance_about_each_axis():
    angle = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)
    density = log_concentrated(angle.cos(), torch.full_like(angle, 900.0)).exp() * (1 - angle.cos()) / math.pi
    assert float(torch.trapezoid(density * angle**2, angle)) / 3 == pytest.approx(1 / 900, rel=0.01)


@pytest.mark.parametrize("concentration", [0.1, 3.0, 400.0])
def test_rotations_are_drawn_from_the_density_and_so_is_the_gradient(concentration, generator):
    """Mean cosine of the angle: that of the density, and its derivative by the concentration, which is the variance of the cosine."""
    angle = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)
    density = log_concentrated(angle.cos(), torch.full_like(angle, concentration)).exp() * (1 - angle.cos()) / math.pi
    mean = float(torch.trapezoid(density * angle.cos(), angle))
    variance = float(torch.trapezoid(density * (angle.cos() - mean).square(), angle))
    x = torch.tensor(concentration, dtype=torch.float64, requires_grad=True)
    centre = so3.random_rotations(1, generator).double()
    found = drawn(centre.expand(10_000, 3, 3), x.expand(10_000), generator)
    cosine = 0.5 * (torch.einsum("bij,ij->b", found, centre[0]) - 1)
    assert float(cosine.mean().detach()) == pytest.approx(mean, abs=4 * (variance / 10_000) ** 0.5)
    cosine.mean().backward()
    assert float(x.grad) == pytest.approx(variance, rel=0.05)
    lopsided = (found @ centre.mT).mean(dim=0).detach()
    torch.testing.assert_close(lopsided, lopsided.diagonal().mean() * torch.eye(3).double(), atol=0.03, rtol=0)


def test_gradients_of_draws_are_the_derivatives(generator):
    x = torch.tensor([0.4, 20.0], dtype=torch.float64, requires_grad=True)
    centres = so3.random_rotations(2, generator).double().requires_grad_()

    def found(r: torch.Tensor, concentration: torch.Tensor) -> torch.Tensor:
        return drawn(r, concentration, torch.Generator().manual_seed(3))

    assert torch.autograd.gradcheck(found, (centres, x))


def test_equivalent_poses_are_equally_near(generator):
    group = point_group("D2").float()
    found, label = so3.random_rotations(12, generator).view(4, 3, 3, 3), so3.random_rotations(4, generator)
    plain = cosines(found, label, group)
    torch.testing.assert_close(cosines(found, label @ group[2], group), plain)
    assert (plain >= cosines(found, label, torch.eye(3)[None]) - 1e-6).all()


def test_mixture_prefers_the_candidate_that_is_right(generator):
    rotations = so3.random_rotations(6, generator).view(2, 3, 3, 3)
    weight = torch.tensor([[0.8, 0.1, 0.1]]).expand(2, 3).log()
    found = EncodedPoses(rotations, torch.zeros(2, 3, 2), weight, torch.full((2, 3), 100.0))
    eye, none = torch.eye(3)[None], torch.zeros(2, 2)
    first, second = (log_mixture(found, rotations[:, h], none, eye, 1.0) for h in (0, 1))
    torch.testing.assert_close(first - second, torch.full((2,), math.log(8.0), dtype=torch.float64), atol=1e-4, rtol=0)
    assert (log_mixture(found, rotations[:, 0], none + 2, eye, 1.0) < first - 3).all()


def test_shift_of_an_image_moves_what_is_seen(generator):
    disk = fourier_disk(24)
    view = View.around(disk, 12, 24.0)
    axis = torch.arange(24, dtype=torch.float32) - 12
    blob = torch.exp(-(axis[:, None] ** 2 + axis**2) / 8)
    values = images_to_disk(blob[None], disk) * phase_ramp(torch.tensor([[2.0, -4.0]]), disk)
    shown = view(values[:, view.columns(disk)])[0]
    assert (torch.nonzero(shown == shown.max())[0] - 6).tolist() == [-2, 1]
