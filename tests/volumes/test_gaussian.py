"""The Gaussian volume: symmetries of its draws, their spread, the divergence, and voxel variances by formula against draws."""

import math

import pytest
import torch

from cryorbit.errors import DataError
from cryorbit.groups.point import point_group
from cryorbit.metrics.resample import move_volume
from cryorbit.physics.fourier import fourier_disk, friedel_weight, shell_index, volume_to_fourier
from cryorbit.volumes.gaussian import GaussianVolume, even

BOXES = pytest.mark.parametrize("box", [8, 9])


def _variance(box: int, generator: torch.Generator) -> torch.Tensor:
    return even(0.5 + torch.rand(box, box, box // 2 + 1, generator=generator, dtype=torch.float64))


def _volume(box: int, generator: torch.Generator, variance: torch.Tensor | None) -> GaussianVolume:
    mean = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    return GaussianVolume.from_map(mean, variance=variance)


@BOXES
def test_variance_is_the_one_that_was_given(box, generator):
    variance = _variance(box, generator)
    torch.testing.assert_close(_volume(box, generator, variance).variance.detach(), variance)
    lopsided = variance.clone()
    lopsided[1, 2, 0] *= 2
    held = _volume(box, generator, lopsided).variance
    assert float((held - even(held)).abs().max().detach()) < 1e-12
    assert float((lopsided - even(lopsided)).abs().max()) > 0.1  # the check can fail


@BOXES
def test_draws_have_the_mean_and_the_variances(box, generator):
    variance = _variance(box, generator)
    volume = _volume(box, generator, variance)
    draws = torch.stack([volume.draw(generator).detach() for _ in range(2000)])
    offset = volume_to_fourier(draws) - volume_to_fourier(volume.data.detach())
    measured = offset.abs().square().mean(dim=0)
    ratio = measured / variance
    assert float((ratio - 1).abs().max()) < 6 * math.sqrt(
        2 / 2000
    )  # real coefficients scatter by sqrt(2), complex by 1
    assert float(offset.mean(dim=0).abs().max()) < 6 * math.sqrt(1.5 / 2000)
    assert float((offset.square().mean(dim=0) / variance)[1, 1, 1].abs()) < 0.1  # circular: no preferred phase


@BOXES
def test_dirac_is_its_mean(box, generator):
    volume = _volume(box, generator, None)
    torch.testing.assert_close(volume.draw(generator), volume.data)
    assert float(volume.variance.abs().max()) == 0
    assert float(volume.voxel_variance().max()) == 0
    certain = _volume(box, generator, torch.zeros(box, box, box // 2 + 1, dtype=torch.float64))
    torch.testing.assert_close(certain.draw(generator), certain.data)


def test_draw_is_differentiable_in_mean_and_variance(generator):
    volume = _volume(8, generator, _variance(8, generator))
    before = generator.get_state()
    direction = torch.randn(8, 8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def value(step: float) -> torch.Tensor:
        generator.set_state(before)
        with torch.no_grad():
            moved = GaussianVolume.from_map(volume.data, variance=(volume.log_variance + step * direction).exp())
        return (moved.draw(generator) * target).sum()

    generator.set_state(before)
    (slope,) = torch.autograd.grad((volume.draw(generator) * target).sum(), [volume.log_variance])
    numeric = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close((slope * direction).sum(), numeric.detach(), rtol=1e-6, atol=1e-9)


@BOXES
def test_divergence_is_the_mean_log_ratio_of_densities(box, generator):
    """By Monte Carlo over draws, from densities of white voxels: no formula in common."""
    prior = torch.linspace(3.0, 1.0, box // 2 + 1, dtype=torch.float64)
    variance = _variance(box, generator)
    volume = _volume(box, generator, variance)
    expected = prior[shell_index(box).clamp(max=box // 2)]
    logs = []
    for _ in range(1500):
        draw = volume.draw(generator).detach()
        total = 0.0
        for mean, spread, sign in ((volume.data.detach(), variance, 1.0), (torch.zeros_like(draw), expected, -1.0)):
            power = volume_to_fourier(draw - mean).abs().square()
            terms = -0.5 * (power / spread + spread.log()) * friedel_weight(box, spread)
            total += sign * float(terms.sum())
        logs.append(total)
    found = float(volume.divergence(prior).detach())
    sample = torch.tensor(logs, dtype=torch.float64)
    assert found == pytest.approx(float(sample.mean()), abs=5 * float(sample.std()) / math.sqrt(len(logs)))
    assert found > 0


def test_divergence_vanishes_at_the_prior(generator):
    prior = torch.tensor([2.0, 1.0, 4.0, 0.5, 1.0], dtype=torch.float64)
    same = prior[shell_index(8).clamp(max=4)]
    volume = GaussianVolume.from_map(torch.zeros(8, 8, 8, dtype=torch.float64), variance=same)
    assert float(volume.divergence(prior).detach().abs()) < 1e-9


@BOXES
def test_voxel_variance_is_that_of_draws(box, generator):
    volume = _volume(box, generator, _variance(box, generator))
    draws = torch.stack([volume.draw(generator).detach() for _ in range(1500)])
    found = volume.voxel_variance()
    assert float((draws.var(dim=0) / found - 1).abs().max()) < 6 * math.sqrt(2 / 1500)


def test_symmetry_axis_is_less_certain(generator):
    """Draws made symmetric, with the variance that symmetric coefficients have: on a four-fold axis four times as uncertain."""
    box, group = 12, point_group("C4")
    smooth = torch.exp(-shell_index(box).double().square() / 8)
    volume = GaussianVolume.from_map(torch.zeros(box, box, box, dtype=torch.float64), variance=smooth)
    draws = []
    for _ in range(250):
        draw = volume.draw(generator).detach()
        draws.append(
            sum(move_volume(draw, g, torch.zeros(3)) for g in group) / 2.0
        )  # of variance 1 for each coefficient
    measured = torch.stack(draws).var(dim=0)
    found = volume.voxel_variance(group)
    centre, inner = box // 2, slice(2, box - 2)
    assert float(found[centre, centre, centre] / found[centre, centre, 2]) > 3.0
    ratio = measured[inner, inner, inner] / found[inner, inner, inner]
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.05)
    assert 0.6 < float(ratio.min()) < float(ratio.max()) < 1.5


def test_slices_are_of_the_mean(generator):
    disk, rotation = fourier_disk(8), torch.eye(3, dtype=torch.float64)[None]
    certain = _volume(8, generator, None)
    spread = GaussianVolume.from_map(certain.data, variance=_variance(8, generator))
    torch.testing.assert_close(spread(rotation, disk), certain(rotation, disk))


def test_variances_of_another_box_are_refused():
    with pytest.raises(DataError, match="DATA230"):
        GaussianVolume(8, variance=torch.ones(8, 8, 8))
