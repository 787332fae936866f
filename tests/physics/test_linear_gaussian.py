"""Posterior of a map at known poses: its variances and its prior against simulation, not against its own formulas."""

import pytest
import torch

from cryorbit.metrics.fsc import shell_sum
from cryorbit.metrics.masks import soft_sphere
from cryorbit.physics.fourier import fourier_disk, fourier_to_volume, shell_index, volume_to_fourier
from cryorbit.physics.linear_gaussian import (
    ball,
    calibrated,
    corrected_mean,
    learned_prior,
    least_squares,
    posterior_mean,
    posterior_variance,
)
from cryorbit.physics.slicing import Accumulator, insert_slices, slice_grid, slicing_grid
from cryorbit.simulate.orientations import Orientations

VIEWS = 600
NOISE = 10.0


def spectrum(box: int) -> torch.Tensor:
    """Prior variances that fall by e every eight shells, from six times to a tenth of what the noise of a shell is at its end."""
    return 40 * torch.exp(-torch.arange(box // 2 + 1) / 8.0)


def draw(box: int, generator: torch.Generator) -> torch.Tensor:
    """A random map of that power spectrum in a ball well inside the box."""
    mask = soft_sphere(box, 0.36 * box)
    white = torch.randn(box, box, box, generator=generator) * mask / mask.square().sum().sqrt()
    amplitude = spectrum(box).sqrt()[shell_index(box).clamp(max=box // 2)]
    return fourier_to_volume(volume_to_fourier(white) * amplitude, box)


def posed(images: torch.Tensor, rotations: torch.Tensor, box: int) -> Accumulator:
    return insert_slices(images, torch.ones(images.shape), rotations, fourier_disk(box))


def observed(volume: torch.Tensor, rotations: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    disk = fourier_disk(volume.shape[0])
    noise = NOISE**0.5 * torch.randn(len(rotations), len(disk), dtype=torch.complex64, generator=generator)
    return slice_grid(slicing_grid(volume, disk.radius, 3), rotations, disk) + noise


def errors(box: int, kind: str, repeats: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared errors of the corrected and of the plain mean over new truths and noise, their variance, share of the prior that is learnt."""
    generator, disk = torch.Generator().manual_seed(3), fourier_disk(box)
    rotations = Orientations(kind).sample(VIEWS, generator)
    noise, prior = torch.full((box // 2 + 1,), NOISE), spectrum(box)
    found, plain = torch.zeros(2, box, box, box // 2 + 1)
    for _ in range(repeats):
        truth = draw(box, generator)
        images = observed(truth, rotations, generator)
        acc = posed(images, rotations, box)
        first, predicted = posterior_mean(acc, noise, prior), posterior_variance(acc, noise, prior)
        left = images - slice_grid(slicing_grid(first, disk.radius), rotations, disk)
        mean = corrected_mean(first, predicted, posed(left, rotations, box), noise, prior)
        found += volume_to_fourier(mean - truth).abs().square() / repeats
        plain += volume_to_fourier(first - truth).abs().square() / repeats
    return found, plain, predicted, 1 - predicted / prior[shell_index(box).clamp(max=box // 2)]


@pytest.mark.parametrize("box", [24, 25])
def test_variance_is_the_mean_square_error(box):
    found, plain, predicted, _ = errors(box, "uniform", 12)
    shells, kept = shell_index(box), ball(box, box / 2)
    ratio, before = (shell_sum(x * kept, shells, box) / shell_sum(predicted, shells, box) for x in (found, plain))
    assert 0.9 < float(ratio[2 : box // 2].min()) < float(ratio[2 : box // 2].max()) < 1.12
    assert float(before[1:4].min()) > 1.2  # what the correction is for
    assert float(predicted[kept == 0].abs().max()) == 0


def test_variance_at_a_missing_cone():
    """Over all degrees of coverage; the inverse of the precision's diagonal alone would be several times too small at the rim."""
    found, _, predicted, information = errors(24, "cone", 12)
    kept = (ball(24, 12.0) > 0) & (shell_index(24) > 2)
    for low, high in ((-0.1, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 0.8)):
        part = kept & (information >= low) & (information < high)
        assert int(part.sum()) > 100
        assert 0.7 < float(found[part].mean() / predicted[part].mean()) < 1.3, (low, high)


def _prior(truth: torch.Tensor, rotations: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    acc = posed(observed(truth, rotations, generator), rotations, truth.shape[0])
    return learned_prior(least_squares(acc), torch.full((truth.shape[0] // 2 + 1,), NOISE))


def test_prior_is_found_without_half_sets(generator):
    box = 24
    for kind in ("uniform", "cone"):
        rotations = Orientations(kind).sample(VIEWS, generator)
        ratio = torch.stack([_prior(draw(box, generator), rotations, generator) for _ in range(4)])
        ratio = ratio.mean(dim=0) / spectrum(box)
        assert 0.6 < float(ratio[3:12].min()) < float(ratio[3:12].max()) < 1.6, kind


def test_no_signal_has_a_prior_near_nothing(generator):
    rotations = Orientations("uniform").sample(VIEWS, generator)
    prior = _prior(torch.zeros(24, 24, 24), rotations, generator)
    expected = NOISE / (
        VIEWS / (2 * torch.arange(1, 13).float())
    )  # noise of a coefficient: N over slices per unit of volume
    assert 0 < float((prior[1:] / expected).min())
    assert float((prior[3:] / expected[2:]).max()) < 0.25  # a few of its standard errors


def _noise(rotations: torch.Tensor, box: int, generator: torch.Generator) -> torch.Tensor:
    return observed(torch.zeros(box, box, box), rotations, generator)


def _halves(residuals: torch.Tensor, rotations: torch.Tensor, box: int) -> list[Accumulator]:
    return [posed(residuals[half::2], rotations[half::2], box) for half in (0, 1)]


@pytest.mark.parametrize(("kind", "views"), [("uniform", 100), ("cone", 600)])
def test_errors_are_what_noise_does(kind, views, generator):
    """Noise of its own, not that of the calibration; the closed form is too high where views are few or leave a cone out."""
    box = 24
    rotations = Orientations(kind).sample(views, generator)
    formula = least_squares(posed(_noise(rotations, box, generator), rotations, box))
    flat = torch.full((box // 2 + 1,), NOISE)
    found = calibrated(formula, *_halves(_noise(rotations, box, generator), rotations, box), flat)
    ratio = []
    for errors in (formula.error, found.error):
        expected = NOISE * errors
        ratio.append(found.sums(formula.power / expected.square())[4:12].sum() / found.sums(1 / expected)[4:12].sum())
    assert float(ratio[0]) < 0.85
    assert float(ratio[1]) == pytest.approx(1.0, abs=0.1)


def test_prior_below_the_noise(generator):
    """Signal of a fifth of what noise leaves in a coefficient, few views: found by the calibrated errors, lost by the closed form."""
    box, views, ratios = 24, 100, []
    for _ in range(4):
        truth, rotations = 0.25 * draw(box, generator), Orientations("uniform").sample(views, generator)
        noise = _noise(rotations, box, generator)
        clean = slice_grid(slicing_grid(truth, box / 2, 3), rotations, fourier_disk(box))
        formula, flat = least_squares(posed(clean + noise, rotations, box)), torch.full((box // 2 + 1,), NOISE)
        both = (formula, calibrated(formula, *_halves(noise, rotations, box), flat))
        ratios.append(torch.stack([learned_prior(x, flat) / (spectrum(box) / 16) for x in both]))
    plain, found = torch.stack(ratios).mean(dim=0)
    assert float(plain[8:12].mean()) < 0.6
    assert float(found[8:12].mean()) == pytest.approx(1.0, abs=0.2)


def test_scale_carries_through(generator):
    """Images in other units: mean, noise and prior scale as they must."""
    rotations = Orientations("uniform").sample(100, generator)
    acc = posed(observed(draw(16, generator), rotations, generator), rotations, 16)
    scaled = Accumulator(acc.numerator * 3, acc.weight, acc.box, acc.oversampling, acc.radius)
    noise = torch.full((9,), NOISE)
    first, second = learned_prior(least_squares(acc), noise), learned_prior(least_squares(scaled), 9 * noise)
    torch.testing.assert_close(second, 9 * first, rtol=1e-4, atol=0)
    torch.testing.assert_close(posterior_mean(scaled, 9 * noise, 9 * first), 3 * posterior_mean(acc, noise, first))
    torch.testing.assert_close(posterior_variance(acc, 9 * noise, 9 * first), 9 * posterior_variance(acc, noise, first))
