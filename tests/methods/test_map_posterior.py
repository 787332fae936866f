"""The posterior of a map at known poses, from images to coverage, against the truth the images were made from."""

from dataclasses import fields, replace

import pytest
import torch
from small_stack import askew_group, covered, known, symmetric_stack

from cryorbit.errors import DataError
from cryorbit.groups.so3 import exp, random_rotations
from cryorbit.methods.map_posterior import map_posterior, pose_variance, standard_normal
from cryorbit.methods.masked_posterior import masked_posterior
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.metrics.fsc import fsc, shell_power, shell_sum
from cryorbit.metrics.spectrum import predicted_resolution, ss_snr, truth_fsc
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier
from cryorbit.physics.linear_gaussian import ball
from cryorbit.poses.local import PoseSamples
from cryorbit.simulate.particles import SimulatedParticles, simulate_particles
from cryorbit.simulate.phantom import phantom
from cryorbit.simulate.settings import CTFSettings
from cryorbit.training.dataset import ArrayParticles, FourierStack

COUNT, APIX = 600, 4.0
ONE, EQUAL = torch.eye(3)[None], torch.ones(COUNT)


def simulated(box: int, width: float = 2.0) -> tuple[FourierStack, SimulatedParticles]:
    """Sharp blobs, so that there is signal up to Nyquist."""
    ctf = CTFSettings(defocus=(6000.0, 20000.0))
    truth = simulate_particles(
        phantom(radius=28.0, width=width),
        count=COUNT,
        box=box,
        pixel_size=APIX,
        snr_db=-3.0,
        ctf=ctf,
        shift_sigma_px=1.0,
        noise="coloured",
        seed=2,
    )
    assert truth.ctf is not None
    values = {f.name: getattr(truth.ctf, f.name).double().numpy() for f in fields(truth.ctf)}
    return FourierStack(ArrayParticles(truth.images.numpy(), APIX, values), box / 2, mask_diameter=80.0), truth


@pytest.fixture(scope="module", params=[24, 25], ids=["even", "odd"])
def case(request):
    stack, truth = simulated(request.param)
    return stack, truth, map_posterior(stack, EQUAL, known(truth), ONE)


def test_intervals_hold_the_truth(case):
    stack, truth, found = case
    true = truth.volume.data * stack.scale
    for level in (0.5, 0.9):
        coverage = interval_coverage(found.mean, found.variance, true, level)
        assert coverage.overall == pytest.approx(level, abs=0.02)
    assert 0.84 < float(coverage.by_shell[3:-1].min()) < float(coverage.by_shell[3:-1].max()) < 0.96


@pytest.mark.parametrize("name", ["C7", "O"])
def test_intervals_hold_the_truth_under_a_point_group(name):
    """About axes that are none of the grid's."""
    group = askew_group(name)
    share = covered(group, lambda stack, poses: map_posterior(stack, torch.ones(len(stack)), poses, group))
    assert share == pytest.approx(0.9, abs=0.025)


@pytest.mark.parametrize("name", ["C1", "C7"])
def test_mean_is_that_of_the_normal_equations(name):
    """Solved by conjugate gradients, on the same noise and prior, in a box without a mask; the last shell is partly filled."""
    group = askew_group(name)
    stack, truth = symmetric_stack(group, 1)
    equal, poses = torch.ones(len(stack)), known(truth)
    found = map_posterior(stack, equal, poses, group)
    free = torch.ones(stack.box, stack.box, stack.box, dtype=torch.bool)
    solved = masked_posterior(stack, equal, poses, group, free, found.noise, found.prior, draws=2)
    index = shell_index(stack.box)
    off = shell_sum(volume_to_fourier(found.mean - solved.mean).abs().square(), index, stack.box)
    apart = (off / shell_sum(found.variance, index, stack.box))[1:-1]
    assert float(apart[0]) < 0.4  # of the posterior's variance
    assert float(apart[1:].max()) < 0.12


def test_noise_spectrum_is_found(case):
    stack, truth, found = case
    expected = truth.noise_spectrum[: len(found.noise)] * (stack.scale * stack.box) ** 2
    assert float((found.noise / expected - 1)[2:-1].abs().max()) < 0.06


def test_prior_is_the_power_of_the_map(case):
    stack, truth, found = case
    ratio = found.prior / shell_power(truth.volume.data * stack.scale)
    assert 0.7 < float(ratio[2:-1].min()) < float(ratio[2:-1].max()) < 1.3


def test_resolution_is_predicted_without_half_sets(case):
    stack, truth, found = case
    alpha, measured = ss_snr(found.mean, found.variance), fsc(found.mean, truth.volume.data)
    assert float((truth_fsc(alpha) - measured)[1:-1].abs().max()) < 0.06
    assert predicted_resolution(alpha, stack.box, APIX) < 80.0


def test_voxel_variance_is_the_mean_square_error(case):
    stack, truth, found = case
    spread = found.volume.voxel_variance()
    kept = ball(stack.box, stack.box / 2)  # a map has no coefficients in the corners
    error = volume_to_fourier(found.mean - truth.volume.data * stack.scale) * kept
    assert float(fourier_to_volume(error, stack.box).var() / spread.mean()) == pytest.approx(1.0, abs=0.12)


def test_standard_normal_prior_is_kept(case):
    stack, truth, _ = case
    found = map_posterior(stack, EQUAL, known(truth), ONE, prior=standard_normal(stack.box))
    torch.testing.assert_close(found.prior, torch.full_like(found.prior, 2.0))
    kept = ball(stack.box, stack.box / 2) > 0
    assert 0 < float(found.variance[kept].max()) <= 2.0 + 1e-4


def test_wrong_poses_make_no_confident_map():
    stack, truth = simulated(24)
    wrong = replace(known(truth), rotations=random_rotations(COUNT, torch.Generator().manual_seed(1)))
    right, lost = (map_posterior(stack, EQUAL, s, ONE) for s in (known(truth), wrong))
    first, second = (predicted_resolution(ss_snr(p.mean, p.variance), 24, APIX) for p in (right, lost))
    assert first < 9.0
    assert second > 1.5 * first


def test_weights_count_as_particles():
    """One pose of weight one, or the same pose as two samples of half the weight: the same posterior."""
    stack, truth = simulated(20)
    once = known(truth)
    twice = PoseSamples(
        once.particle.repeat_interleave(2),
        once.rotations.repeat_interleave(2, dim=0),
        once.shifts.repeat_interleave(2, dim=0),
        torch.full((2 * COUNT,), 0.5),
    )
    first, second = (map_posterior(stack, EQUAL, s, ONE) for s in (once, twice))
    torch.testing.assert_close(first.mean, second.mean, rtol=0, atol=1e-3 * float(first.mean.abs().max()))
    torch.testing.assert_close(first.variance, second.variance, rtol=2e-3, atol=1e-6 * float(first.variance.max()))


def test_some_of_the_images_find_the_noise_too(case):
    """As many numbers are taken from fewer images: what is left is corrected by their own count."""
    stack, truth, all_of_them = case
    found = map_posterior(stack, EQUAL, known(truth).rows(torch.arange(COUNT) < 200), ONE, all_of_them.prior)
    expected = truth.noise_spectrum[: len(found.noise)] * (stack.scale * stack.box) ** 2
    assert float((found.noise / expected)[2:-1].mean()) == pytest.approx(1.0, abs=0.02)


def test_one_image_is_refused(case):
    stack, truth, _ = case
    with pytest.raises(DataError, match="DATA232"):
        map_posterior(stack, EQUAL, known(truth).rows(torch.arange(COUNT) == 3), ONE)


def test_poses_that_move_the_map_add_variance(case):
    stack, truth, found = case
    generator = torch.Generator().manual_seed(4)

    def drawn(spread: float) -> list[PoseSamples]:
        once = known(truth)
        turns = [exp(spread * torch.randn(COUNT, 3, generator=generator)) for _ in range(4)]
        return [replace(once, rotations=turn @ once.rotations) for turn in turns]

    none, some = (pose_variance(stack, EQUAL, drawn(spread), ONE, found) for spread in (0.0, 0.15))
    assert float(none[0].max()) < 1e-6 * float(some[0].max())
    assert float(none[1].max()) < 1e-6 * float(some[1].max())
    sphere = truth.volume.data > 0.3 * truth.volume.data.max()
    assert float(some[1][sphere].mean()) > 1.5 * float(some[1][~sphere].mean())  # where there is density to be moved
