"""A posterior as a mixture: its levels are uniform over its own draws, its spread and entropy are those of its draws, its mirror is one."""

import math
from dataclasses import replace

import pytest
import torch

from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import distance, exp, half_turn, random_rotations
from cryorbit.metrics.align import PoseAlignment, framed, unframed
from cryorbit.poses.posterior import PosedParticles, PosePosterior, levels_of_truth
from cryorbit.poses.widening import map_error
from cryorbit.types import Poses


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


def level_of_draws(posterior: PosePosterior, law: PosePosterior, generator: torch.Generator) -> torch.Tensor:
    """Levels in ``posterior`` of one draw of each particle from ``law``."""
    rotations, shifts = drawn(law, generator)
    return posterior.level_of(rotations[:, None], shifts[:, None], generator)


@pytest.mark.parametrize("second", [0.0, 0.3])
def test_levels_of_its_own_draws_are_uniform(generator, second):
    posterior = mixture(2000, generator, second)
    level = level_of_draws(posterior, posterior, generator)
    for part in (0.1, 0.5, 0.9, 0.99):
        assert float((level < part).double().mean()) == pytest.approx(part, abs=0.03)


def test_an_overconfident_posterior_shows_in_the_levels(generator):
    honest = mixture(1000, generator, 0.0)
    narrow = PosePosterior(honest.rotations, honest.shifts, honest.mass, honest.covariance / 2)
    level = level_of_draws(narrow, honest, generator)
    assert float((level < 0.9).double().mean()) < 0.75


def test_spread_is_that_of_its_draws(generator):
    p = mixture(4, generator)
    many = PosePosterior(*(x.repeat_interleave(4000, dim=0) for x in (p.rotations, p.shifts, p.mass, p.covariance)))
    rotations, shifts = drawn(many, generator)
    angle = distance(rotations, many.rotations[:, 0]).view(4, -1).square().mean(dim=1).sqrt()
    apart = (shifts - many.shifts[:, 0]).square().sum(dim=1).view(4, -1).mean(dim=1).sqrt()
    torch.testing.assert_close(p.spread[0], angle, rtol=0.05, atol=0.0)
    torch.testing.assert_close(p.spread[1], apart, rtol=0.05, atol=0.0)


def test_modes_that_a_symmetry_makes_alike_do_not_spread(generator):
    group = point_group("C7").float()
    p = mixture(3, generator)
    first = p.rotations[:, :1].expand_as(p.rotations)
    alike = replace(p, rotations=first @ group[torch.randint(7, first.shape[:2], generator=generator)])
    together = replace(p, rotations=first)
    torch.testing.assert_close(alike.spread_up_to(group)[0], together.spread[0], rtol=1e-4, atol=1e-4)
    assert bool((alike.spread[0] > 2 * together.spread[0]).any())
    torch.testing.assert_close(alike.spread_up_to(group)[1], alike.spread[1])


def test_entropy_of_one_and_of_two_far_modes(generator):
    p = mixture(3, generator, 0.0)
    normal = torch.distributions.MultivariateNormal(torch.zeros(5), p.covariance[:, 0]).entropy()
    torch.testing.assert_close(p.entropy, normal, atol=1e-3, rtol=1e-3)
    twice = PosePosterior(p.rotations, p.shifts, torch.full((3, 2), 0.5), p.covariance[:, :1].expand(-1, 2, -1, -1))
    torch.testing.assert_close(twice.entropy, normal + math.log(2), atol=1e-3, rtol=1e-3)


def test_the_mirrored_posterior_gives_mirrored_poses_the_same_levels(generator):
    posterior = mixture(200, generator)
    rotations, shifts = drawn(posterior, generator)
    plain = posterior.level_of(rotations[:, None], shifts[:, None], torch.Generator().manual_seed(2))
    mirrored = posterior.mirrored()
    torch.testing.assert_close(mirrored.rotations, half_turn(posterior.rotations))
    other = mirrored.level_of(half_turn(rotations)[:, None], shifts[:, None], torch.Generator().manual_seed(2))
    torch.testing.assert_close(plain, other, atol=0.08, rtol=0.0)  # other draws of the same law


def test_modes_in_different_asymmetric_units_are_brought_together(generator):
    one, group = mixture(20, generator, 0.4), point_group("C7").float()
    turn = exp(0.05 * torch.randn(20, 3, generator=generator))
    near = torch.stack([one.rotations[:, 0], turn @ one.rotations[:, 0]], dim=1)
    mates = torch.stack([near[:, 0], near[:, 1] @ group[3]], dim=1)
    together = PosePosterior(mates, one.shifts, one.mass, one.covariance).in_one_unit(group)
    torch.testing.assert_close(together.rotations, near, atol=1e-5, rtol=0.0)


def test_angstrom_change_the_spread_and_not_the_levels(generator):
    pixels = mixture(100, generator)
    rotations, shifts = drawn(pixels, generator)
    angstrom = pixels.in_angstrom(1.5)
    torch.testing.assert_close(angstrom.spread[1], 1.5 * pixels.spread[1])
    torch.testing.assert_close(angstrom.entropy, pixels.entropy + 2 * math.log(1.5), atol=1e-4, rtol=0.0)
    one, two = (
        p.level_of(rotations[:, None], s[:, None], torch.Generator().manual_seed(3))
        for p, s in ((pixels, shifts), (angstrom, 1.5 * shifts))
    )
    torch.testing.assert_close(one, two, atol=0.01, rtol=0.0)


def test_shifts_that_were_held_count_for_nothing(generator):
    held = mixture(500, generator, 0.0)
    held.covariance[..., 3:, :] = held.covariance[..., :, 3:] = 0.0
    held.covariance[..., 3, 3] = held.covariance[..., 4, 4] = 1e-12
    assert held.free == 3
    rotations, shifts = drawn(held, generator)
    level = held.level_of(rotations[:, None], shifts[:, None] + 1.0, generator)  # an origin elsewhere
    assert float((level < 0.9).double().mean()) == pytest.approx(0.9, abs=0.04)
    assert held.entropy.isfinite().all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_levels_of_truth_in_another_frame(generator, mirrored):
    """The truth is drawn from the posterior and told in another frame, origin and hand; C3 mates count as one pose."""
    posterior, group = mixture(400, generator, 0.0), point_group("C3").double()
    rotations, shifts = (x.double() for x in drawn(posterior, generator))
    frame, origin = random_rotations(1, generator)[0].double(), torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
    true = framed(rotations, shifts, frame, origin, mirrored=mirrored)
    torch.testing.assert_close(unframed(*true, frame, origin, mirrored=mirrored), (rotations, shifts))
    zero = torch.zeros(400, dtype=torch.float64)
    mates = Poses(true[0] @ group[torch.arange(400) % 3], true[1])
    found = PoseAlignment(frame, origin, mirrored, mates, zero, zero, zero, zero, 0.0, 0.0)
    level = levels_of_truth(posterior, mates, found, group)
    assert float((level < 0.9).double().mean()) == pytest.approx(0.9, abs=0.05)


def test_map_error_adds_the_scatter_between_maps_to_the_attenuated_noise(generator):
    count, fsc, map_share = 4000, 0.8, 0.3
    root = torch.randn(count, 5, 5, dtype=torch.float64, generator=generator)
    hessian = root @ root.mT + 5 * torch.eye(5, dtype=torch.float64)
    white = torch.randn(count, 5, dtype=torch.float64, generator=generator) * (2 * map_share) ** 0.5
    offset = torch.linalg.solve(torch.linalg.cholesky(hessian).mT, white[:, :, None])[:, :, 0]
    assert map_error(offset, hessian, hessian / fsc) == pytest.approx(fsc + map_share, abs=0.02)
    assert map_error(0 * offset, hessian, hessian / fsc) == 1.0  # maps that are one and the same


def test_scale_spread_is_what_noise_does_not_explain(generator):
    noise = 0.1 * torch.randn(5000, generator=generator)
    error, posterior = torch.full((5000,), 0.1), mixture(1, generator)
    for spread in (0.0, 0.3):
        scale = 1 + spread * torch.randn(5000, generator=generator) + noise
        posed = PosedParticles(posterior, scale, error, 1.0)
        assert posed.scale_spread == pytest.approx(spread, abs=0.03)
