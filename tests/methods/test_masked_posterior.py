"""The posterior of a map that is zero outside a mask, against the truth and the posterior without one."""

from dataclasses import dataclass, replace

import pytest
import torch
from small_stack import askew_group, covered, known

from cryorbit.groups.point import point_group
from cryorbit.methods.map_posterior import MapPosterior, map_posterior
from cryorbit.methods.masked_posterior import MaskedPosterior, masked_posterior
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.metrics.masks import mask_from_map, soft_sphere
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.orientations import Orientations
from cryorbit.simulate.particles import simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack

COUNT, BOX, APIX = 400, 28, 4.0
ONE, EQUAL = torch.eye(3)[None], torch.ones(COUNT)


@dataclass(frozen=True)
class Case:
    stack: FourierStack
    poses: PoseSamples
    truth: torch.Tensor
    support: torch.Tensor
    plain: MapPosterior

    def masked(self, symmetry: torch.Tensor = ONE, *, draws: int = 8, non_negative: bool = False) -> MaskedPosterior:
        noise, prior = self.plain.noise, self.plain.prior
        return masked_posterior(
            self.stack,
            EQUAL,
            self.poses,
            symmetry,
            self.support,
            noise,
            prior,
            draws=draws,
            non_negative=non_negative,
        )

    def error(self, mean: torch.Tensor, where: torch.Tensor | None = None) -> float:
        off = (mean - self.truth).square()
        return float(off.mean() if where is None else off[where].mean())


class Lifted(FourierStack):
    """Images with another mean."""

    def images(self, particles: torch.Tensor) -> torch.Tensor:
        return super().images(particles) + 100.0 * (self.disk.shell == 0)


def made(kind: str, seed: int) -> Case:
    found = simulate_particles(
        phantom(radius=28.0, width=3.0),
        count=COUNT,
        box=BOX,
        pixel_size=APIX,
        snr_db=-13.0,
        shift_sigma_px=1.0,
        orientations=Orientations(kind),
        seed=seed,
    )
    stack = FourierStack(ArrayParticles(found.images.numpy(), APIX), BOX / 2, mask_diameter=90.0)
    poses = known(found)
    support = mask_from_map(found.volume.data, APIX) > 0
    return Case(stack, poses, found.volume.data * stack.scale, support, map_posterior(stack, EQUAL, poses, ONE))


@pytest.fixture(scope="module", params=["uniform", "preferred"])
def case(request) -> Case:
    return made(request.param, 4)


def test_mask_brings_the_map_nearer_the_truth_and_intervals_hold_it(case):
    found, inside = case.masked(), case.support
    assert float(inside.float().mean()) < 0.4
    assert float(found.mean[~inside].abs().max()) == 0.0
    assert case.error(found.mean) < 0.7 * case.error(case.plain.mean)
    assert case.error(found.mean, inside) < 0.9 * case.error(case.plain.mean, inside)
    assert interval_coverage(found.mean, found.variance, case.truth).overall == pytest.approx(0.9, abs=0.03)
    limit = 1.645 * found.voxel_variance.sqrt()
    covered = ((found.mean - case.truth).abs() < limit)[inside].float().mean()
    assert float(covered) == pytest.approx(0.9, abs=0.06)


def test_no_voxel_is_negative_and_the_error_falls_again(case):
    found, free = case.masked(non_negative=True), case.masked()
    assert float(found.mean.min()) == 0.0
    assert float(free.mean.min()) < -0.01 * float(free.mean.max())
    assert case.error(found.mean) < 0.75 * case.error(free.mean)
    torch.testing.assert_close(found.variance, free.variance)


@pytest.mark.parametrize("name", ["C7", "O"])
def test_intervals_hold_the_truth_under_a_point_group(name):
    group = askew_group(name)

    def within_a_sphere(stack: FourierStack, poses: PoseSamples) -> MaskedPosterior:
        equal, sphere = torch.ones(len(stack)), soft_sphere(stack.box, 8.0, 0.0) > 0.5
        plain = map_posterior(stack, equal, poses, group)
        return masked_posterior(stack, equal, poses, group, sphere, plain.noise, plain.prior, draws=16)

    assert covered(group, within_a_sphere) == pytest.approx(0.9, abs=0.025)


def test_level_of_the_images_says_nothing():
    """Not only is the background subtracted: what is left of it has no say in the level of the map."""
    case = made("uniform", 3)
    lifted = Lifted(case.stack.particles, BOX / 2, mask_diameter=90.0)
    every = torch.arange(COUNT)
    assert float((lifted.images(every) - case.stack.images(every)).abs().max()) == pytest.approx(100.0, rel=1e-3)
    first, second = (c.masked(draws=2).mean for c in (case, replace(case, stack=lifted)))
    assert torch.equal(first, second)


def test_symmetric_map_is_symmetric_and_less_certain_on_its_axis(case):
    """A voxel on the axis of C2 is its own mate and has twice the variance it would have alone; others have what they had."""
    symmetry = point_group("C2").float()
    sphere = replace(case, support=soft_sphere(BOX, 9.0) > 0)
    alone, found = sphere.masked(draws=2), sphere.masked(symmetry, draws=8)
    for mean, least, most in ((alone.mean, 0.5, 2.0), (found.mean, 0.0, 0.03)):
        turned = mean.flip(1, 2).roll((1, 1), dims=(1, 2))
        assert least < float((turned - mean).norm() / mean.norm()) < most
    middle = BOX // 2
    axis = found.voxel_variance[middle - 4 : middle + 5, middle, middle].mean()
    away = found.voxel_variance[middle - 4 : middle + 5, middle, middle + 6].mean()
    assert 1.5 < float(axis / away) < 2.5
