"""Spectral SNR against correlations of maps made to have it; coverage of intervals that are right, too small, too large."""

import pytest
import torch

from cryorbit.errors import DataError
from cryorbit.metrics.calibration import interval_coverage
from cryorbit.metrics.fsc import fsc
from cryorbit.metrics.spectrum import (
    full_set_fsc,
    half_set_fsc,
    in_mask,
    predicted_resolution,
    ss_snr,
    truth_fsc,
)
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier

BOX = 32


def _white(generator: torch.Generator, variance: torch.Tensor, box: int) -> torch.Tensor:
    noise = volume_to_fourier(torch.randn(box, box, box, generator=generator, dtype=torch.float64)) / box**1.5
    return fourier_to_volume(noise * variance[shell_index(box).clamp(max=len(variance) - 1)].sqrt(), box)


def _case(generator: torch.Generator, box: int) -> dict[str, torch.Tensor]:
    """A truth, the posterior mean from all particles, and means from each half, with a signal that falls through the noise."""
    signal = 100 * torch.exp(-torch.arange(box // 2 + 1, dtype=torch.float64) / 2.5)
    noise = torch.full_like(signal, 2.0)
    truth = _white(generator, signal, box)
    first, second = (truth + _white(generator, 2 * noise, box) for _ in range(2))
    weight = (signal / (signal + noise))[shell_index(box).clamp(max=box // 2)]
    mean = fourier_to_volume(volume_to_fourier(0.5 * (first + second)) * weight, box)
    variance = (signal * noise / (signal + noise))[shell_index(box).clamp(max=box // 2)]
    return {"truth": truth, "mean": mean, "first": first, "second": second, "variance": variance}


@pytest.mark.parametrize("box", [BOX, BOX + 1])
def test_ratio_predicts_the_correlations(generator, box):
    case = _case(generator, box)
    alpha = ss_snr(case["mean"], case["variance"])
    assert float((truth_fsc(alpha) - fsc(case["mean"], case["truth"]))[2:].abs().max()) < 0.08
    assert float((half_set_fsc(alpha) - fsc(case["first"], case["second"]))[2:].abs().max()) < 0.12
    assert (full_set_fsc(alpha) >= half_set_fsc(alpha)).all()
    assert (truth_fsc(alpha) >= full_set_fsc(alpha)).all()


def test_thresholds_are_one_resolution():
    alpha = torch.tensor([1 / 3])
    assert float(half_set_fsc(alpha)) == pytest.approx(0.143, abs=1e-3)
    assert float(truth_fsc(alpha)) == pytest.approx(0.5)


def test_resolution_is_where_the_ratio_crosses():
    alpha = torch.full((17,), 10.0)
    assert predicted_resolution(alpha, 32, 2.0) == 4.0
    alpha[8:] = 0.0
    assert 8.0 < predicted_resolution(alpha, 32, 2.0) < 64 / 7
    last = torch.full((17,), 10.0)
    last[-1] = 0.0
    assert predicted_resolution(last, 32, 2.0) == 4.0


def test_mask_takes_noise_away(generator):
    alpha = torch.full((9,), 2.0)
    mask = torch.zeros(16, 16, 16)
    mask[4:12, 4:12, 4:12] = 1
    torch.testing.assert_close(in_mask(alpha, mask), torch.full((9,), 16.0, dtype=torch.float64), check_dtype=False)


def test_no_coefficients_no_signal():
    assert float(ss_snr(torch.ones(8, 8, 8), torch.zeros(8, 8, 5)).max()) == 0
    with pytest.raises(DataError, match="DATA231"):
        ss_snr(torch.ones(8, 8, 8), torch.zeros(8, 8, 8))


@pytest.mark.parametrize("box", [24, 25])
def test_coverage_is_the_level_and_only_then(generator, box):
    case = _case(generator, box)
    for level in (0.5, 0.9):
        found = interval_coverage(case["mean"], case["variance"], case["truth"], level)
        assert found.overall == pytest.approx(level, abs=0.015)
    assert interval_coverage(case["mean"], case["variance"] / 2, case["truth"]).overall < 0.8
    assert interval_coverage(case["mean"], case["variance"] * 2, case["truth"]).overall > 0.96
    half = torch.where(shell_index(box) > box // 4, 0.0, case["variance"])
    cut = interval_coverage(case["mean"], half, case["truth"])
    assert cut.by_shell[box // 4 + 1 :].isnan().all()
    assert cut.overall == pytest.approx(0.9, abs=0.03)
