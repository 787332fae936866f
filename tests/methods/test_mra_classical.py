"""Spectral, L-BFGS, bispectrum and EM recover known signals: exactly from exact moments, to the noise from noisy ones."""

import math

import pytest
import torch

from cryorbit.errors import ConfigError, DataError
from cryorbit.methods.mra_classical import bispectrum as invert_bispectrum
from cryorbit.methods.mra_classical import lbfgs, mismatch, nearest_density, shifts_evidence, spectral
from cryorbit.methods.mra_em import em, em_round
from cryorbit.metrics.signals import FINE, signal_error
from cryorbit.physics.moments import MomentSums, analytic_moments, bispectrum, characteristic, mean_bispectrum
from cryorbit.pipeline.mra import _EVIDENCE
from cryorbit.simulate.mra import Mixtures, observations


def drawn(components: int, generator: torch.Generator, length: int = 41) -> tuple[torch.Tensor, torch.Tensor]:
    signals, densities = Mixtures(length=length, components=components).draw(1, generator)
    return signals[0], densities[0]


def noisy(signal, density, count, sigma, generator):
    return torch.cat(list(observations(signal, density, count, sigma, generator)))


@pytest.mark.parametrize("components", [1, 2, 3])
@pytest.mark.parametrize("length", [40, 41])
def test_spectral_is_exact_without_noise(components, length, generator):
    signal, density = drawn(components, generator, length)
    moments = analytic_moments(signal, density)
    found = spectral(moments)
    assert float(signal_error(found[0], signal, FINE)) < 1e-4
    assert float(signal_error(found[1], density, FINE)) < 1e-2
    assert float(signal_error(spectral(moments, sweeps=0)[0], signal, FINE)) < 0.05


def test_signal_and_density_come_in_one_frame(generator):
    """Their moments are the ones given, which a density moved by one sample does not have."""
    signal, density = drawn(2, generator)
    moments = analytic_moments(signal, density)
    v, rho = spectral(moments)
    assert mismatch(v, rho, moments) < 0.01 * mismatch(v, rho.roll(1), moments)


def test_signals_keep_their_sign(generator):
    """Also without a mean, where the first moment starts at zero."""
    signal, density = drawn(2, generator)
    for v in (-signal, signal - signal.mean(), signal.mean() - signal):
        assert float(signal_error(spectral(analytic_moments(v, density))[0], v, FINE)) < 1e-3


def test_signal_whose_density_has_two_equal_peaks(generator):
    """The leading eigenvalue is nearly double there: the plain eigenvector is wrong, the method is not."""
    signal, _ = drawn(3, generator)
    x = torch.arange(41, dtype=torch.float64)
    density = torch.exp(-0.5 * ((x - 10) / 2) ** 2) + torch.exp(-0.5 * ((x - 28) / 2) ** 2)
    moments = analytic_moments(signal, density / density.sum())
    assert float(signal_error(spectral(moments)[0], signal, FINE)) < 1e-4
    assert float(signal_error(spectral(moments, sweeps=0)[0], signal, FINE)) > 1e-2


def test_spectral_error_falls_with_the_count(generator):
    signal, density = drawn(2, generator)
    data = noisy(signal, density, 32_000, 1.0, generator)
    errors = [
        [
            float(signal_error(found, true, FINE))
            for found, true in zip(spectral(MomentSums.of(data[:n]).debiased(1.0)), (signal, density), strict=True)
        ]
        for n in (1000, 32_000)
    ]
    assert errors[1][0] < 0.05
    assert errors[1][1] < 0.1
    assert errors[1][0] < 0.6 * errors[0][0]


def test_evidence_of_shifts_parts_uniform_from_nearly_uniform(generator):
    """The command warns below ``_EVIDENCE``; a tenth of structure is enough to be above."""
    signal, density = drawn(2, generator, length=21)
    uniform = torch.full_like(density, 1 / 21)
    evidence = []
    for rho in (uniform, 0.9 * uniform + 0.1 * density):
        moments = MomentSums.of(noisy(signal, rho, 50_000, 1.0, generator)).debiased(1.0)
        evidence.append(shifts_evidence(spectral(moments)[0], moments))
    assert evidence[0] < _EVIDENCE < evidence[1]


def test_noise_alone_is_refused(generator):
    noise = torch.randn(500, 20, generator=generator)
    with pytest.raises(DataError, match="DATA403"):
        spectral(MomentSums.of(noise).debiased(2.0))


def test_nearest_density_is_a_density_and_keeps_one(generator):
    _, density = drawn(2, generator)
    exact = torch.full((41,), 1e9, dtype=torch.float64)
    torch.testing.assert_close(nearest_density(characteristic(density), exact), density, atol=1e-3, rtol=0)
    rough = nearest_density(torch.randn(41, dtype=torch.complex128, generator=generator), exact)
    assert float(rough.sum()) == pytest.approx(1.0)
    assert float(rough.min()) >= 0
    unknown = nearest_density(characteristic(density), 0 * exact)
    torch.testing.assert_close(unknown, torch.full_like(density, 1 / 41))


def test_lbfgs_fits_moments_and_signal(generator):
    signal, density = drawn(3, generator)
    moments = analytic_moments(signal, density)
    found = lbfgs(moments, generator, restarts=1, iterations=300)
    assert float(signal_error(found[0], signal, FINE)) < 0.05
    assert float(found[1].sum()) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="CONF401"):
        lbfgs(moments, generator, restarts=0)


def test_bispectrum_needs_no_density(generator):
    """Also with uniform shifts, where second moments hold no phases and the spectral method fails."""
    signal, _ = drawn(3, generator)
    uniform = torch.full((41,), 1 / 41, dtype=torch.float64)
    moments = analytic_moments(signal, uniform)
    found = invert_bispectrum(bispectrum(signal), moments)
    assert float(signal_error(found[0], signal, FINE)) < 1e-4
    assert float(signal_error(spectral(moments)[0], signal, FINE)) > 0.1


def test_bispectrum_is_blind_to_shifts_and_unbiased(generator):
    signal, density = drawn(2, generator, length=15)
    torch.testing.assert_close(bispectrum(signal.roll(4)), bispectrum(signal))
    truth = bispectrum(signal)
    data = noisy(signal, density, 40_000, 0.5, generator)
    errors = [float((mean_bispectrum(data[:n]) - truth).norm() / truth.norm()) for n in (1000, 40_000)]
    assert errors[1] < 0.05
    assert errors[1] < 0.4 * errors[0]


def test_em_climbs_and_improves_on_its_start(generator):
    signal, density = drawn(3, generator)
    data = noisy(signal, density, 6000, 1.0, generator)
    start = spectral(MomentSums.of(data[:600]).debiased(1.0))
    found = em(data, 1.0, start, rounds=15)
    steps = torch.tensor(found.log_likelihood).diff()
    assert float(steps.min()) > -1e-5
    assert found.log_likelihood[-1] > em_round(data, *start, 1.0)[2]
    assert float(signal_error(found.signal, signal, FINE)) < 0.1
    assert float(found.density.sum()) == pytest.approx(1.0)


def test_em_with_the_density_of_the_moments_is_nearer(generator):
    """It only moves the signal, and with few noisy observations gets nearer than with the density free."""
    signal, density = drawn(2, generator)
    data = noisy(signal, density, 8000, 2.0, generator)
    start = spectral(MomentSums.of(data).debiased(4.0))
    held, free = (em(data, 2.0, start, rounds=10, hold_density=hold) for hold in (True, False))
    torch.testing.assert_close(held.density, start[1], atol=0, rtol=0)
    assert float(torch.tensor(held.log_likelihood).diff().min()) > -1e-5
    off = [float(signal_error(found.signal, signal, FINE)) for found in (held, free)]
    assert off[0] < off[1]


def test_em_likelihood_is_that_of_the_model(generator):
    """Against the density of a mixture of normals written out."""
    signal, density = drawn(2, generator, length=7)
    data = noisy(signal, density, 5, 0.8, generator).double()
    copies = torch.stack([signal.roll(s) for s in range(7)])
    squares = (data[:, None] - copies).square().sum(-1)
    each = (density.log() - squares / (2 * 0.64)).logsumexp(1) - 3.5 * math.log(2 * math.pi * 0.64)
    assert em_round(data, signal, density, 0.8)[2] == pytest.approx(float(each.mean()))


def test_em_needs_noise(generator):
    signal, density = drawn(2, generator)
    with pytest.raises(ConfigError, match="CONF402"):
        em(noisy(signal, density, 5, 0.0, generator), 0.0, (signal, density))
