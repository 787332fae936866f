"""The posterior around modes: calibrated against truth, weighs modes, merges what has come together."""

import pytest
import torch

from cryorbit.groups.point import point_group
from cryorbit.groups.so3 import distance, exp, log, random_rotations
from cryorbit.physics.cryoem import forward
from cryorbit.physics.fourier import FourierDisk, fourier_disk
from cryorbit.physics.posing import pose_losses
from cryorbit.physics.slicing import SlicingGrid, slicing_grid
from cryorbit.poses.local import PoseSamples, local_posterior, sample_points

BOX, RADIUS = 24, 9.0
EVERY = torch.eye(3)[None]


def blobs(group: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """A map of 12 blobs and their mates."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(BOX, dtype=torch.float32) - BOX // 2
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).flip(-1)
    centres = 4 * torch.randn(12, 3, generator=generator)
    weights = torch.rand(12, generator=generator) + 0.5
    return sum(
        w * torch.exp(-((x - g @ c) ** 2).sum(-1) / 6) for w, c in zip(weights, centres, strict=True) for g in group
    )


@pytest.fixture(scope="module")
def grid() -> SlicingGrid:
    return slicing_grid(blobs(EVERY), RADIUS)


def noisy(
    grid: SlicingGrid, disk: FourierDisk, count: int, snr: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """True rotations and shifts, images, CTF, precision."""
    truth, shifts = random_rotations(count, generator), torch.randn(count, 2, generator=generator)
    ctf = 0.5 + torch.rand(count, len(disk), generator=generator)
    clean = forward(grid, truth, shifts, disk, ctf)
    variance = float(clean.abs().square().mean()) / snr
    noise = torch.complex(*(torch.randn(2, *clean.shape, generator=generator) * (0.5 * variance) ** 0.5))
    # a pixel counts for itself and its mate: precision is 2 over the variance of a complex number, the origin's 1
    return truth, shifts, clean + noise, ctf, disk.weight / variance


def posterior(grid, images, ctf, precision, starts, disk, **options):
    settings = {"symmetry": EVERY, "points": sample_points(len(images), 48, 0), "modes": 3, "iterations": 8} | options
    return local_posterior(grid, images, ctf, precision, starts, disk, **settings)


@pytest.mark.parametrize("snr", [3.0, 1.5])
def test_the_spread_of_the_samples_is_the_error(grid, generator, snr):
    disk = fourier_disk(BOX, RADIUS)
    count = 200
    truth, shifts, images, ctf, precision = noisy(grid, disk, count, snr, generator)
    start = exp(0.05 * torch.randn(count, 3, generator=generator)) @ truth
    starts = start[:, None], shifts[:, None], torch.ones(count, 1, dtype=torch.bool)
    modes, samples, _ = posterior(grid, images, ctf, precision, starts, disk, points=sample_points(count, 500, 0))
    owner, weight = samples.particle, samples.weight.double()
    torch.testing.assert_close(torch.zeros(count).double().index_add(0, owner, weight), torch.ones(count).double())
    centre = modes.rotations[:, 0]
    offset = torch.cat([log(samples.rotations @ centre[owner].mT), samples.shifts - modes.shifts[owner, 0]], 1).double()
    mean = torch.zeros(count, 5).double().index_add(0, owner, weight[:, None] * offset)
    away = offset - mean[owner]
    outer = weight[:, None, None] * away[:, :, None] * away[:, None, :]
    spread = torch.zeros(count, 5, 5).double().index_add(0, owner, outer)
    error = torch.cat([log(truth @ centre.mT), shifts - modes.shifts[:, 0]], 1).double() - mean
    near = (error[:, :3].norm(dim=1) < 0.5) & (torch.bincount(owner, minlength=count) > 20)
    assert float(near.float().mean()) > 0.94
    scaled = torch.einsum("ni,nij,nj->n", error[near], torch.linalg.inv(spread[near]), error[near])
    assert (
        0.84 < float((scaled < 9.236).float().mean()) < 0.95
    )  # the 90 % point of chi-square with 5 degrees of freedom


def test_equivalent_modes_share_the_mass_unless_the_symmetry_is_known(generator):
    group = point_group("C2").float()
    grid, disk = slicing_grid(blobs(group), RADIUS), fourier_disk(BOX, RADIUS)
    truth, shifts, images, ctf, precision = noisy(grid, disk, 20, 30.0, generator)
    both = truth[:, None] @ group
    starts = both, shifts[:, None].expand(20, 2, 2), torch.ones(20, 2, dtype=torch.bool)
    modes, _, _ = posterior(grid, images, ctf, precision, starts, disk)
    assert float((modes.mass[:, :2] - 0.5).abs().median()) < 0.05
    known, _, _ = posterior(grid, images, ctf, precision, starts, disk, symmetry=group)
    assert torch.equal(known.mass, torch.eye(3)[0].expand(20, 3))


def test_starts_that_meet_are_one_mode_and_a_wrong_one_has_no_mass(grid, generator):
    disk = fourier_disk(BOX, RADIUS)
    truth, shifts, images, ctf, precision = noisy(grid, disk, 30, 30.0, generator)
    near = exp(0.03 * torch.randn(30, 2, 3, generator=generator)) @ truth[:, None]
    rotations = torch.cat([random_rotations(30, generator)[:, None], near], 1)
    used = torch.ones(30, 3, dtype=torch.bool)
    used[:10, 2] = False
    modes, samples, loss = posterior(
        grid, images, ctf, precision, (rotations, shifts[:, None].expand(30, 3, 2), used), disk
    )
    assert float((modes.mass[:, 0] > 0.99).float().mean()) > 0.8
    assert (modes.mass[:, :-1] >= modes.mass[:, 1:]).all()
    assert float(distance(modes.rotations[:, 0], truth).median()) < 0.03
    assert torch.equal(samples.particle, samples.particle.sort().values)
    assert torch.isfinite(loss).all()


def test_sharp_posteriors_are_one_pose_and_fixed_shifts_stay(grid, generator):
    disk = fourier_disk(BOX, RADIUS)
    truth, shifts, images, ctf, precision = noisy(grid, disk, 10, 1e4, generator)
    starts = truth[:, None], shifts[:, None] + 0.01, torch.ones(10, 1, dtype=torch.bool)
    modes, samples, _ = posterior(grid, images, ctf, precision, starts, disk, fit_shift=False)
    assert torch.equal(samples.particle, torch.arange(10))
    assert torch.equal(modes.shifts[:, 0], shifts + 0.01)


def test_few_points_find_the_covariance_of_a_sharp_posterior(grid, generator):
    """There the posterior is normal: what few points make of it is what the Gauss-Newton matrix says, and not their own scatter."""
    disk = fourier_disk(BOX, RADIUS)
    truth, shifts, images, ctf, precision = noisy(grid, disk, 100, 1e4, generator)
    starts = truth[:, None], shifts[:, None], torch.ones(100, 1, dtype=torch.bool)
    exact = posterior(grid, images, ctf, precision, starts, disk)[0].covariance[:, 0]
    points = sample_points(100, 16, 0)
    assert abs(float(points.square().mean()) - 1) > 0.03
    found = posterior(grid, images, ctf, precision, starts, disk, points=points, widen=1.5, sharp=0.0)[0].covariance[
        :, 0
    ]
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)


def test_moved_samples_show_the_moved_map_as_before(grid, generator):
    turn, offset = exp(torch.tensor([0.3, -0.2, 0.5])), torch.tensor([0.4, -0.7, 0.2])
    rotations, shifts = random_rotations(5, generator), torch.randn(5, 2, generator=generator)
    before = PoseSamples(torch.arange(5), rotations, shifts, torch.ones(5))
    after = before.moved(turn, offset)
    point = torch.tensor([1.0, 2.0, 3.0])  # of the map, and where the motion puts it
    there = turn @ point + offset
    shown = (rotations @ point)[:, :2] + shifts
    torch.testing.assert_close((after.rotations @ there)[:, :2] + after.shifts, shown)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_thinned_samples_stand_for_all_on_average(generator, most):
    count, shares = 3000, torch.tensor([0.45, 0.3, 0.2, 0.05])
    particle = torch.arange(7, 7 + 2 * count, 2).repeat_interleave(4)
    shifts = torch.arange(4.0).repeat(count)[:, None].expand(-1, 2)
    before = PoseSamples(particle, random_rotations(4 * count, generator), shifts, shares.repeat(count))
    after = before.thinned(most)
    number, kept = after.particle.unique_consecutive(return_counts=True)
    assert torch.equal(number, particle[::4])
    assert int(kept.max()) <= most
    sums = torch.zeros(int(particle.max()) + 1).index_add(0, after.particle, after.weight)[number]
    torch.testing.assert_close(sums, torch.ones(count))
    mean = torch.zeros(4).index_add(0, after.shifts[:, 0].long(), after.weight) / count
    torch.testing.assert_close(mean, shares, atol=3 / count, rtol=0)  # evenly spread, not drawn: no square root


def test_one_pose_thinned_is_itself(generator):
    alone = PoseSamples(torch.arange(50), random_rotations(50, generator), torch.randn(50, 2), torch.ones(50))
    after = alone.thinned(3)
    assert torch.equal(after.particle, alone.particle)
    assert torch.equal(after.weight, alone.weight)


def test_fixed_shifts_leave_rotations_sampled(grid, generator):
    disk = fourier_disk(BOX, RADIUS)
    truth, shifts, images, ctf, precision = noisy(grid, disk, 60, 1.5, generator)
    starts = truth[:, None], shifts[:, None], torch.ones(60, 1, dtype=torch.bool)
    _, samples, _ = posterior(grid, images, ctf, precision, starts, disk, fit_shift=False)
    kept = torch.bincount(samples.particle, minlength=60)
    assert float(kept.float().median()) > 16  # of 48
    torch.testing.assert_close(samples.shifts, shifts[samples.particle], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("sharp", "off"), [(0.0, 0.15), (1e9, 0.5)], ids=["sampled", "laplace"])
def test_masses_of_modes_are_integrals_of_the_likelihood(grid, generator, sharp, off):
    disk = fourier_disk(BOX, RADIUS)
    truth, shifts, images, ctf, precision = noisy(grid, disk, 400, 1.0, generator)
    others = random_rotations(400 * 5, generator).view(400, 5, 3, 3)
    rotations = torch.cat([truth[:, None], others], 1)
    starts = rotations, shifts[:, None].expand(400, 6, 2), torch.ones(400, 6, dtype=torch.bool)
    options = {"modes": 2, "points": sample_points(400, 200, 0), "iterations": 12, "sharp": sharp}
    modes, _, _ = posterior(grid, images, ctf, precision, starts, disk, **options)
    two = (modes.mass[:, 1] > 0.05) & (distance(modes.rotations[:, 0], modes.rotations[:, 1]) > 1.0)
    assert int(two.sum()) >= 16
    box = (
        torch.rand(20_000, 5, generator=generator) * 2 - 1
    )  # the same box around either mode: masses go as means of the likelihood
    box = box * torch.tensor([0.3] * 3 + [1.5] * 2)
    differences = []
    for b in torch.nonzero(two)[:16, 0].tolist():
        turns = exp(box[:, :3])[None] @ modes.rotations[b, :, None]
        moves = box[None, :, 3:] + modes.shifts[b, :, None]
        one = images[b : b + 1].expand(2, -1), ctf[b : b + 1].expand(2, -1)
        log_mean = (-pose_losses(grid, *one, precision, turns, moves, disk)).logsumexp(dim=1)
        differences.append(float((modes.mass[b, 0] / modes.mass[b, 1]).log() - (log_mean[0] - log_mean[1])))
    values = torch.tensor(differences)
    assert float(values.abs().median()) < off
    assert abs(float(values.mean())) < off


def test_a_coarse_look_ends_where_a_fine_one_does(grid, generator):
    disk, count = fourier_disk(BOX, RADIUS), 60
    truth, shifts, images, ctf, precision = noisy(grid, disk, count, 30.0, generator)
    near = exp(0.1 * torch.randn(count, 3, generator=generator)) @ truth
    two = torch.stack([random_rotations(count, generator), near], dim=1), shifts[:, None].expand(-1, 2, -1)
    starts = *two, torch.ones(count, 2, dtype=torch.bool)
    fine, _, _ = posterior(grid, images, ctf, precision, starts, disk)
    coarse, _, _ = posterior(grid, images, ctf, precision, starts, disk, coarse=4.0)
    assert float((distance(fine.rotations[:, 0], truth) < 0.1).double().mean()) > 0.9
    assert float(distance(fine.rotations[:, 0], coarse.rotations[:, 0]).median()) < 1e-3
    assert float((distance(fine.rotations[:, 0], coarse.rotations[:, 0]) < 0.01).double().mean()) > 0.9
