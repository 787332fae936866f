"""A posterior as a mixture: its levels are uniform over its own draws, its spread and entropy are those of its draws, its mirror is one."""

import math

import pytest
import torch

from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import distance, exp, half_turn, random_rotations
from cryorbit.poses.posterior import PosedParticles, PosePosterior, map_error


def mixture(count: int, generator: torch.Generator, second: float = 0.3) -> PosePosterior:
    """Two modes per particle, the second holding ``second`` of the mass."""
    root = torch.randn(count, 2, 5, 5, generator=generator) * torch.tensor([0.05, 0.05, 0.05, 0.3, 0.3])[:, None]
    covariance = root @ root.mT + 1e-4 * torch.eye(5)
    mass = torch.tensor([1 - second, second]).expand(count, 2)
    rotations = random_rotations(2 * count, generator).view(count, 2, 3, 3)
    return PosePosterior(rotations, torch.randn(count, 2, 2, generator=generator), mass, covariance)


def drawn(p: PosePosterior, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One pose from the posterior of each particle."""
    row, mode = torch.arange(len(p.mass)), torch.multinomial(p.mass, 1, generator=generator)[:, 0]
    factor = torch.linalg.cholesky(p.covariance[row, mode])
    step = (factor @ torch.randn(len(row), 5, 1, generator=generator))[:, :, 0]
    return exp(step[:, :3]) @ p.rotations[row, mode], p.shifts[row, mode] + step[:, 3:]


@pytest.mark.parametrize("second", [0.0, 0.3])
def test_levels_of_its_own_draws_are_uniform(generator, second):
    posterior = mixture(2000, generator, second)
    level = posterior.level_of(*drawn(posterior, generator), generator)
    for part in (0.1, 0.5, 0.9, 0.99):
        assert float((level < part).double().mean()) == pytest.approx(part, abs=0.03)


def test_an_overconfident_posterior_shows_in_the_levels(generator):
    honest = mixture(1000, generator, 0.0)
    narrow = PosePosterior(honest.rotations, honest.shifts, honest.mass, honest.covariance / 2)
    level = narrow.level_of(*drawn(honest, generator), generator)
    assert float((level < 0.9).double().mean()) < 0.75


def test_equivalent_poses_have_one_level(generator):
    posterior, group = mixture(50, generator, 0.0), point_group("C3").double()
    rotations, shifts = drawn(posterior, generator)
    mate = rotations @ group[1].float()
    one, two = (posterior.level_of(r, shifts, torch.Generator().manual_seed(1), group) for r in (rotations, mate))
    torch.testing.assert_close(one, two)
    assert float(posterior.level_of(mate, shifts, generator).median()) > 0.99  # were it not known


def test_spread_is_that_of_its_draws(generator):
    p = mixture(4, generator)
    many = PosePosterior(*(x.repeat_interleave(4000, dim=0) for x in (p.rotations, p.shifts, p.mass, p.covariance)))
    rotations, shifts = drawn(many, generator)
    angle = distance(rotations, many.rotations[:, 0]).view(4, -1).square().mean(dim=1).sqrt()
    apart = (shifts - many.shifts[:, 0]).square().sum(dim=1).view(4, -1).mean(dim=1).sqrt()
    torch.testing.assert_close(p.spread[0], angle, rtol=0.05, atol=0.0)
    torch.testing.assert_close(p.spread[1], apart, rtol=0.05, atol=0.0)


def test_entropy_of_one_and_of_two_far_modes(generator):
    p = mixture(3, generator, 0.0)
    normal = torch.distributions.MultivariateNormal(torch.zeros(5), p.covariance[:, 0]).entropy()
    torch.testing.assert_close(p.entropy, normal, atol=1e-3, rtol=1e-3)
    twice = PosePosterior(p.rotations, p.shifts, torch.full((3, 2), 0.5), p.covariance[:, :1].expand(-1, 2, -1, -1))
    torch.testing.assert_close(twice.entropy, normal + math.log(2), atol=1e-3, rtol=1e-3)


def test_the_mirrored_posterior_gives_mirrored_poses_the_same_levels(generator):
    posterior = mixture(200, generator)
    rotations, shifts = drawn(posterior, generator)
    plain = posterior.level_of(rotations, shifts, torch.Generator().manual_seed(2))
    mirrored = posterior.mirrored()
    torch.testing.assert_close(mirrored.rotations, half_turn(posterior.rotations))
    other = mirrored.level_of(half_turn(rotations), shifts, torch.Generator().manual_seed(2))
    torch.testing.assert_close(plain, other, atol=0.08, rtol=0.0)  # other draws of the same law


def test_map_error_adds_the_scatter_between_maps_to_the_attenuated_noise(generator):
    count, fsc, map_share = 4000, 0.8, 0.3
    root = torch.randn(count, 5, 5, dtype=torch.float64, generator=generator)
    hessian = root @ root.mT + 5 * torch.eye(5, dtype=torch.float64)
    white = torch.randn(count, 5, dtype=torch.float64, generator=generator) * (2 * map_share) ** 0.5
    offset = torch.linalg.solve(torch.linalg.cholesky(hessian).mT, white[:, :, None])[:, :, 0]
    assert map_error(offset, hessian, hessian / fsc) == pytest.approx(fsc + map_share, abs=0.02)


def test_scale_spread_is_what_noise_does_not_explain(generator):
    noise = 0.1 * torch.randn(5000, generator=generator)
    error, posterior = torch.full((5000,), 0.1), mixture(1, generator)
    for spread in (0.0, 0.3):
        scale = 1 + spread * torch.randn(5000, generator=generator) + noise
        posed = PosedParticles(posterior, scale, error, torch.zeros(5000), 1.0)
        assert posed.scale_spread == pytest.approx(spread, abs=0.03)
