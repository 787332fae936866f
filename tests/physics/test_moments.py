"""Moments of shifted signals: against sums written out, against simulated observations, gradients, merging."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from cryorbit.errors import DataError
from cryorbit.groups.cyclic import Cyclic
from cryorbit.physics.fourier import circular_correlation, fourier_to_signal, signal_to_fourier
from cryorbit.physics.moments import MomentSums, analytic_moments, real_space, relative_errors
from cryorbit.physics.mra import MRA, shift_signal
from cryorbit.simulate.mra import Mixtures, observations


@pytest.fixture(params=[8, 9], ids=["even", "odd"])
def problem(request: pytest.FixtureRequest, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    signal = torch.randn(request.param, generator=generator, dtype=torch.float64)
    density = torch.rand(request.param, generator=generator, dtype=torch.float64)
    return signal, density / density.sum()


def test_moments_are_averages_over_shifted_copies(problem):
    """Against the sums of eq. 26 and 27 over ``MRA.observe``, in real space and in Fourier space."""
    signal, density = problem
    copies = MRA(Cyclic(len(signal))).observe(signal, torch.arange(len(signal)))
    found = analytic_moments(signal, density)
    first, second = real_space(found)
    torch.testing.assert_close(first, density @ copies)
    torch.testing.assert_close(second, copies.T @ (density[:, None] * copies))
    hats = signal_to_fourier(copies)
    torch.testing.assert_close(found.first, (density[:, None] * hats).sum(0))
    torch.testing.assert_close(found.second, torch.einsum("s,sk,sl->kl", density + 0j, hats, hats.conj()))


def test_sign_of_equation_26_and_not_of_equation_4(problem):
    """A density at shift 1 alone multiplies by exp(-2 pi i k / n); the other sign is far off."""
    signal, _ = problem
    n = len(signal)
    one = torch.zeros(n, dtype=torch.float64).index_fill(0, torch.tensor([1]), 1.0)
    ratio = (analytic_moments(signal, one).first / signal_to_fourier(signal))[1]
    expected = torch.exp(torch.tensor(-2j * math.pi / n, dtype=torch.complex128))
    torch.testing.assert_close(ratio, expected)
    assert float((ratio - expected.conj()).abs()) > 0.5


def test_a_common_shift_cannot_be_seen(problem):
    signal, density = problem
    moved = analytic_moments(signal.roll(3), density.roll(-3))
    torch.testing.assert_close(moved.second, analytic_moments(signal, density).second)
    assert float(relative_errors(analytic_moments(signal.roll(3), density), analytic_moments(signal, density))[0]) > 0.1


def test_gradcheck(problem):
    signal, density = (x.requires_grad_() for x in problem)

    def both(v, rho):
        found = analytic_moments(v, rho)
        return torch.view_as_real(found.first), torch.view_as_real(found.second)

    assert gradcheck(both, (signal, density))


def test_batch_is_its_members_and_arguments_stay(problem):
    signal, density = problem
    pair = torch.stack([signal, signal.flip(0)]), torch.stack([density, density])
    kept = pair[0].clone()
    together = analytic_moments(*pair)
    torch.testing.assert_close(together.second[1], analytic_moments(signal.flip(0), density).second)
    torch.testing.assert_close(pair[0], kept, atol=0, rtol=0)


def simulated(count: int, sigma: float, generator: torch.Generator):
    signals, densities = Mixtures(length=21).draw(1, generator)
    blocks = list(observations(signals[0], densities[0], count, sigma, generator))
    return analytic_moments(signals[0], densities[0]), torch.cat(blocks)


def test_empirical_moments_tend_to_the_analytic_ones(generator):
    """Errors fall with the root of the count and are a few per cent at 40,000; without debiasing they stay."""
    truth, data = simulated(40_000, 1.0, generator)
    few = relative_errors(MomentSums.of(data[:1000]).debiased(1.0), truth)
    many = relative_errors(MomentSums.of(data).debiased(1.0), truth)
    assert float(many[1]) < 0.04
    assert float(many[1]) < 0.4 * float(few[1])
    assert float(many[0]) < 0.4 * float(few[0])
    biased = relative_errors(MomentSums.of(data).debiased(0.0), truth)
    assert float(biased[1]) > 5 * float(many[1])


def test_merged_parts_are_the_whole(generator):
    _, data = simulated(3000, 1.0, generator)
    data = data.double()
    parts = MomentSums.of(data[:700]) + (MomentSums.of(data[700:701]) + MomentSums.of(data[701:]))
    whole = MomentSums.of(data)
    assert parts.count == whole.count == 3000
    torch.testing.assert_close(parts.second, whole.second)
    torch.testing.assert_close(parts.first, whole.first)


def test_noise_is_read_off_the_empty_frequencies(generator):
    _, data = simulated(20_000, 0.7, generator)
    assert MomentSums.of(data).noise_variance() == pytest.approx(0.49, rel=0.03)


def test_sums_refuse_what_cannot_be_averaged():
    with pytest.raises(DataError, match="DATA401"):
        MomentSums.of(torch.zeros(2, 5)) + MomentSums.of(torch.zeros(2, 6))
    with pytest.raises(DataError, match="DATA402"):
        MomentSums.of(torch.zeros(0, 5)).debiased(1.0)


@pytest.mark.parametrize("n", [8, 9])
def test_fractional_shifts(n, generator):
    """Whole shifts are rolls, fractions add up, a cosine moves as a cosine does, the correlation says by how much."""
    v = torch.randn(n, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(shift_signal(v, torch.tensor(3.0, dtype=torch.float64)), v.roll(3))
    x = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    quarter = torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(shift_signal(torch.cos(2 * x), quarter), torch.cos(2 * (x - quarter * x[1])))
    smooth = torch.cos(x) + torch.sin(2 * x)
    peak = circular_correlation(smooth, shift_signal(smooth, 5 * quarter), 4).argmax()
    assert int(peak) == 5
    correlation = circular_correlation(v, v.roll(2))
    torch.testing.assert_close(correlation, torch.stack([(v.roll(2) * v.roll(s)).sum() for s in range(n)]))
    torch.testing.assert_close(fourier_to_signal(signal_to_fourier(v)), v)
    torch.testing.assert_close(circular_correlation(v, v, 3)[::3], circular_correlation(v, v))
