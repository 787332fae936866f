"""Held-out likelihood: known answers for a small linear-Gaussian model and for poses by quadrature; better models score higher."""

import math

import pytest
import torch
from small_stack import APIX, BOX, COUNT, small_stack

from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import distance, exp, healpix_grid, random_rotations
from cryorbit.methods.held_out import HeldOut, held_out
from cryorbit.methods.map_posterior import MapPosterior, map_posterior
from cryorbit.metrics.held_out import effective_samples, importance_weighted
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import FourierDisk, fourier_disk, fourier_to_volume, images_to_disk, volume_to_fourier
from cryorbit.physics.linear_gaussian import ball, slice_variance
from cryorbit.physics.noise import coloured_spectrum, log_likelihood, radial_noise
from cryorbit.physics.slicing import slice_grid, slicing_grid
from cryorbit.poses.local import PoseSamples
from cryorbit.poses.posterior import PosePosterior
from cryorbit.poses.proposals import PoseProposals, proposed, shift_prior
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.training.dataset import ArrayParticles, FourierStack
from cryorbit.volumes.gaussian import GaussianVolume

ONE = torch.eye(3)[None]


def coordinates(values: torch.Tensor, disk: FourierDisk) -> torch.Tensor:
    """Orthonormal real coordinates of images: white noise of variance v has variance v in each."""
    scaled = values * (disk.weight.sqrt() / disk.box)
    imaginary = scaled.imag[..., (disk.kx != 0) | (disk.ky != 0)]
    return torch.cat([scaled.real, imaginary], dim=-1)


@pytest.fixture(scope="module")
def linear() -> tuple[torch.Tensor, ...]:
    """Images of a map drawn from its posterior at one pose: exact, closed-form and sampled log densities."""
    box, noise, generator = 6, 1.0, torch.Generator().manual_seed(5)
    disk, rotations = fourier_disk(box, 2.5), random_rotations(1, generator).double()
    kept = ball(box, 3.0).double()
    variance = kept * 0.4 * noise * box**2 * torch.exp(0.3 * torch.randn(kept.shape, generator=generator).double())
    mean = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    volume = GaussianVolume.from_map(mean, variance=variance)

    def sliced(data: torch.Tensor) -> torch.Tensor:
        return slice_grid(slicing_grid(data, 2.5, 3), rotations, disk)[0]

    spread = volume.variance.detach().sqrt() / box**1.5
    basis = torch.eye(box**3, dtype=torch.float64).view(-1, box, box, box)
    columns = torch.stack([sliced(fourier_to_volume(volume_to_fourier(b) * spread, box)) for b in basis])
    real = coordinates(columns, disk)
    model = torch.distributions.MultivariateNormal(
        coordinates(sliced(mean), disk), real.T @ real + noise * torch.eye(real.shape[1], dtype=torch.float64)
    )
    count, white = 400, torch.randn(20400, box**3, generator=generator, dtype=torch.float64)
    draws = sliced(mean) + torch.complex(white @ columns.real, white @ columns.imag)
    grain = torch.randn(count, box, box, generator=generator, dtype=torch.float64)
    images = draws[:count] + images_to_disk(grain, disk)
    exact = model.log_prob(coordinates(images, disk))
    total = noise + slice_variance(volume.variance.detach(), rotations, disk) / box**2
    closed = log_likelihood(images, sliced(mean).expand_as(images), total.expand(count, -1), disk)
    plain = log_likelihood(images, sliced(mean).expand_as(images), noise, disk)
    weights = torch.stack([log_likelihood(y.expand_as(draws), draws, noise, disk)[count:] for y in images[:100]])
    return exact, closed, plain, weights


def test_closed_form_is_the_exact_density_to_first_order(linear):
    """Pixels of a slice are not quite independent: of what the map's variance changes, a few per cent are lost."""
    exact, closed, plain, _ = linear
    gain = float((exact - plain).mean())
    assert gain > 0.5  # nats per image of 21 numbers
    assert abs(float((closed - exact).mean())) < 0.12 * gain
    assert float((closed - exact).std()) < 0.25 * float((exact - plain).std())


def test_sampled_bound_lies_below_rises_and_approaches(linear):
    exact, _, _, weights = linear
    exact = exact[: len(weights)]
    counts = (1, 10, 100, 1000, weights.shape[1])
    bounds = []
    for count in counts:
        parts = weights[:, : weights.shape[1] // count * count].view(len(exact), -1, count)
        bounds.append(float((importance_weighted(parts).mean(dim=1) - exact).mean()))
    assert bounds == sorted(bounds)
    assert bounds[0] < -3.0
    assert -0.3 < bounds[-1] < 0.05
    assert 1.0 <= float(effective_samples(weights).min()) < weights.shape[1]


def broad(rotations: torch.Tensor, angle: float, shift: float) -> PosePosterior:
    """One mode for each image."""
    variance = torch.tensor([angle**2] * 3 + [shift**2] * 2)
    count = len(rotations)
    covariance = torch.diag(variance).expand(count, 1, 5, 5)
    return PosePosterior(rotations[:, None], torch.zeros(count, 1, 2), torch.ones(count, 1), covariance)


def test_proposals_weigh_a_ball_by_its_volume(generator):
    """Of rotations uniform on the group, and of shifts from a normal distribution."""
    posterior = broad(random_rotations(1, generator), 0.6, 0.8)
    found = proposed(posterior, 40000, generator, group=2, shift_sigma=1.5)
    angle = distance(*torch.broadcast_tensors(found.rotations, posterior.rotations.double()))
    for turn, radius in ((0.5, 1.0), (1.0, 0.5)):
        inside = (angle < turn) & (found.shifts.norm(dim=2) < radius)
        expected = 2 * (turn - math.sin(turn)) / math.pi * (1 - math.exp(-0.5 * (radius / 1.5) ** 2))
        assert float((found.log_weight.exp() * inside).mean()) == pytest.approx(expected, rel=0.05)
    assert shift_prior(posterior) == pytest.approx(0.8, rel=1e-5)


def test_bound_over_poses_approaches_the_integral(generator):
    """Against several dense grids of rotations."""
    box, count, draws = 16, 4, 4000
    volume = simulate_particles(phantom(radius=16.0, width=5.0), count=1, box=box, pixel_size=4.0, seed=1).volume.data
    disk, true = fourier_disk(box, 4.0), random_rotations(count, generator)
    grid = slicing_grid(0.25 * volume / volume.std(), 4.0)
    white = torch.randn(count, len(disk), dtype=torch.complex64, generator=generator)
    images = forward(grid, true, None, disk, None) + white * box

    def score(rotations: torch.Tensor) -> torch.Tensor:
        """Of each image at its own rotations."""
        seen = zip(rotations.float(), images, strict=True)
        return torch.stack(
            [log_likelihood(y.expand(len(r), -1), slice_grid(grid, r, disk), 1.0, disk) for r, y in seen]
        )

    turned = (random_rotations(4, generator)[:, None] @ healpix_grid(3)).flatten(0, 1)
    exact = importance_weighted(score(turned.expand(count, -1, -1, -1)).double())
    found = proposed(broad(true, 0.2, 1e-6), draws, generator)
    weights = score(found.rotations).double() + found.log_weight
    bounds = [
        float((importance_weighted(weights.view(count, -1, k)).mean(dim=1) - exact).mean()) for k in (1, 20, draws)
    ]
    assert bounds == sorted(bounds)
    assert bounds[0] < -5.0
    assert bounds[-1] == pytest.approx(0.0, abs=0.2)


TRAINED = 350


@pytest.fixture(scope="module")
def case() -> tuple[FourierStack, SimulatedParticles, MapPosterior]:
    stack, truth = small_stack(4)
    return stack, truth, trained(stack, truth, ONE)


def trained(stack: FourierStack, truth: SimulatedParticles, group: torch.Tensor, count: int = TRAINED) -> MapPosterior:
    every = torch.arange(count)
    poses = PoseSamples(every, truth.poses.rotations[every], truth.poses.shifts[every] / APIX, torch.ones(count))
    return map_posterior(stack, torch.ones(COUNT), poses, group)


def scored(
    stack: FourierStack, truth: SimulatedParticles, found: MapPosterior, noise: float = 1.0, turn: float = 0.0
) -> HeldOut:
    """The images that were left out, at their true poses or poses turned from them."""
    rest = torch.arange(TRAINED, COUNT)
    rotations = exp(torch.tensor([turn, 0.0, 0.0])) @ truth.poses.rotations[rest]
    proposals = PoseProposals.known(rotations, truth.poses.shifts[rest] / APIX)
    return held_out(stack, rest, proposals, found.volume, noise * found.noise)


def test_prediction_of_unseen_images_is_what_they_are(case):
    """Residuals have the predicted variance in every shell; without the map's own variance, few images' map is too sure."""
    stack, truth, found = case
    right = scored(stack, truth, found)
    assert float((right.residual[2:-1] - 1).abs().max()) < 0.06
    assert float(right.residual[2:-1].mean()) == pytest.approx(1.0, abs=0.015)
    assert float(right.effective.min()) == 1.0
    few, rest = trained(stack, truth, ONE, 150), torch.arange(TRAINED, COUNT)
    own = scored(stack, truth, few)
    poses = PoseProposals.known(truth.poses.rotations[rest], truth.poses.shifts[rest] / APIX)
    certain = held_out(stack, rest, poses, GaussianVolume.from_map(few.mean), few.noise)
    assert float(own.residual[2:-1].mean()) == pytest.approx(1.0, abs=0.02)
    assert float(certain.residual[2:-1].mean()) > 1.04
    off = own.log_density - certain.log_density
    assert float(off.mean()) > 3 * float(off.std()) / len(rest) ** 0.5


def test_background_of_images_is_not_scored(case):
    """A constant more in every image changes Fourier pixel 0 alone, and no score."""
    stack, truth, found = case
    more = FourierStack(ArrayParticles(truth.images.numpy(), APIX), BOX / 2, mask_diameter=70.0)
    before = more.images
    more.images = lambda chosen: before(chosen) + (more.disk.shell == 0) * 100.0
    one, other = (scored(x, truth, found) for x in (stack, more))
    for name in ("log_density", "empty", "effective"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_worse_models_score_lower(case):
    """Of noise levels, poses and symmetries the true ones win, by many standard errors."""
    stack, truth, found = case
    right = scored(stack, truth, found)
    assert right.gain > 20 * right.gain_error > 0
    others = [scored(stack, truth, found, noise=x) for x in (0.8, 1.25)]
    others += [
        scored(stack, truth, found, turn=0.3),
        scored(stack, truth, trained(stack, truth, point_group("C2").float())),
    ]
    for other in others:
        off = right.log_density - other.log_density
        assert float(off.mean()) > 5 * float(off.std()) / len(off) ** 0.5


@pytest.mark.parametrize("spectrum", ["white", "coloured"])
def test_noise_predicts_no_noise(case, spectrum, generator):
    """A map made of images without a particle, at random poses, says nothing of others: no score beyond its standard error.
    Images that had a part in the map do get one."""
    _, truth, _ = case
    power = coloured_spectrum(BOX, APIX) if spectrum == "coloured" else torch.ones(1)
    for _ in range(3):
        noise = radial_noise(COUNT, BOX, power, generator)
        stack = FourierStack(ArrayParticles(noise.numpy(), APIX), BOX / 2, mask_diameter=70.0)
        found = scored(stack, truth, trained(stack, truth, ONE))
        assert found.gain < found.gain_error
        leaked = scored(stack, truth, trained(stack, truth, ONE, COUNT))  # the same images in the map and in the score
        assert leaked.gain > 3 * leaked.gain_error


def test_unknown_poses_cost_what_they_leave_open(case, generator):
    """The bound over poses rises with their number and stays below the density at the true ones."""
    stack, truth, found = case
    rest = torch.arange(TRAINED, COUNT)
    posterior = broad(truth.poses.rotations[rest], 0.06, 0.15)
    shifted = PosePosterior(
        posterior.rotations, truth.poses.shifts[rest, None] / APIX, posterior.mass, posterior.covariance
    )
    gains = [
        held_out(stack, rest, proposed(shifted, count, generator), found.volume, found.noise).gain
        for count in (1, 8, 64)
    ]
    assert gains == sorted(gains)
    assert 4.0 < scored(stack, truth, found).gain - gains[-1] < 20.0
    joined = HeldOut.joined([scored(stack, truth, found), scored(stack, truth, found, turn=0.3)])
    assert joined.gain < scored(stack, truth, found).gain
    assert len(joined.empty) == 2 * len(rest)
