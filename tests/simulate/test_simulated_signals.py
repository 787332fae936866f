"""Simulated signals and observations: normalisation, band limit, seeds, statistics of the shifts and of the noise."""

import math

import pytest
import torch

from cryorbit.errors import ConfigError
from cryorbit.physics.fourier import signal_to_fourier
from cryorbit.simulate.mra import Mixtures, observations


@pytest.mark.parametrize("components", [1, 2, 3])
def test_draws_are_normalised_and_band_limited(components, generator):
    signals, densities = Mixtures(components=components).draw(50, generator)
    torch.testing.assert_close(signals.square().mean(1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(densities.sum(1), torch.ones(50, dtype=torch.float64))
    assert bool((densities >= 0).all())
    power = signal_to_fourier(signals).abs()
    assert float((power[:, 20] / power[:, 0]).max()) < 1e-5


def test_widths_are_those_asked_for(generator):
    """One Gaussian of known width: the second moment of the samples about the peak."""
    _, density = Mixtures(length=400, components=1, width=(0.05, 0.05)).draw(1, generator)
    centred = density[0].roll(200 - int(density[0].argmax()))
    x = (torch.arange(400) - 200) / 400
    spread = ((centred * x.square()).sum() - (centred * x).sum() ** 2).sqrt()
    assert float(spread) == pytest.approx(0.05, rel=1e-3)


def test_observations_are_shifted_copies_with_noise(generator):
    signals, densities = Mixtures(length=20).draw(1, generator)
    clean = torch.cat(list(observations(signals[0], densities[0], 20_000, 0.0, generator)))
    copies = torch.stack([signals[0].roll(s) for s in range(20)]).float()
    which = torch.cdist(clean, copies)
    assert float(which.amin(1).max()) < 0.01  # float32 distances; neighbours are 0.3 apart
    share = torch.bincount(which.argmin(1), minlength=20) / 20_000
    torch.testing.assert_close(share.double(), densities[0], atol=0.015, rtol=0)
    noisy = torch.cat(list(observations(0 * signals[0], densities[0], 20_000, 0.5, generator)))
    assert float(noisy.std()) == pytest.approx(0.5, rel=0.01)


def test_a_seed_fixes_the_set_whatever_its_size_in_blocks():
    signals, densities = Mixtures(length=12).draw(1, torch.Generator().manual_seed(0))

    def made() -> torch.Tensor:
        blocks = list(observations(signals[0], densities[0], 20_000, 1.0, torch.Generator().manual_seed(3)))
        assert len(blocks) == 2
        return torch.cat(blocks)

    torch.testing.assert_close(made(), made(), atol=0, rtol=0)
    assert made().shape == (20_000, 12)


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"length": 3}, "CONF341"), ({"components": 0}, "CONF341"), ({"width": (0.1, 0.05)}, "CONF342")],
)
def test_impossible_families_are_refused(settings, code):
    with pytest.raises(ConfigError, match=code):
        Mixtures(**settings)


def test_negative_noise_is_refused(generator):
    half = torch.full((8,), 0.125)
    with pytest.raises(ConfigError, match="CONF343"):
        next(observations(half, half, 10, -1.0, generator))
    with pytest.raises(ConfigError, match="CONF343"):
        next(observations(half, half, 10, math.nan, generator))
