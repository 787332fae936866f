"""Electron counts: the likelihood against torch.distributions, the rate's limits, its gradient and its information."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Poisson

from cryorbit.errors import DataError
from cryorbit.physics.counts import check_counts, count_information, count_log_likelihood, electron_rate

DOSES = [0.05, 1.0, 30.0]


def spread(dose: float) -> torch.Tensor:
    """Excesses from twice the dose below zero to nine times above, in float64."""
    return dose * torch.linspace(-2.0, 9.0, 23, dtype=torch.float64)


@pytest.mark.parametrize("dose", DOSES)
def test_log_likelihood_is_that_of_poisson(dose: float) -> None:
    counts = torch.arange(8, dtype=torch.float64)[:, None].expand(8, 23)
    excess = spread(dose).expand(8, 23)
    expected = Poisson(electron_rate(excess, dose)).log_prob(counts)
    torch.testing.assert_close(count_log_likelihood(counts, excess, dose), expected, rtol=1e-6, atol=1e-6)


def test_rate_is_dose_and_excess_where_the_documents_say() -> None:
    rate = electron_rate(torch.tensor([-1.0, -0.5, 0.0, 4.0], dtype=torch.float64), 1.0)
    above = (rate - torch.tensor([0.0, 0.5, 1.0, 5.0])).tolist()
    assert above == pytest.approx([0.0693, 6.7e-4, 4.5e-6, 0.0], rel=0.01, abs=1e-9)


@pytest.mark.parametrize("dose", DOSES)
def test_gradients(dose: float) -> None:
    excess = spread(dose).requires_grad_()
    counts = torch.arange(23, dtype=torch.float64) % 5
    for function in (
        lambda x: electron_rate(x, dose),
        lambda x: count_log_likelihood(counts, x, dose),
        lambda x: count_information(x, dose),
    ):
        assert torch.autograd.gradcheck(function, [excess], eps=1e-6 * dose)


@pytest.mark.parametrize("dose", DOSES)
def test_score_has_mean_zero_and_the_information_for_variance(dose: float) -> None:
    """Summed over all counts a pixel can have."""
    excess = spread(dose).requires_grad_()
    mean, variance = torch.zeros(23, dtype=torch.float64), torch.zeros(23, dtype=torch.float64)
    for n in range(700):
        log = count_log_likelihood(torch.full_like(excess, n), excess, dose)
        (score,) = torch.autograd.grad(log.sum(), [excess])
        mean, variance = mean + log.detach().exp() * score, variance + log.detach().exp() * score.square()
    assert float((mean * dose).abs().max()) < 1e-6
    torch.testing.assert_close(count_information(excess.detach(), dose), variance, rtol=1e-6, atol=1e-12)


def test_far_below_zero_all_is_finite_and_counts_pull_up() -> None:
    excess = torch.tensor([-3.0, -30.0, -3e3], requires_grad=True)
    log = count_log_likelihood(torch.tensor([2.0, 1.0, 1.0]), excess, 1.0)
    (gradient,) = torch.autograd.grad(log.sum(), [excess])
    assert bool(torch.isfinite(log).all())
    assert gradient.tolist() == pytest.approx([20.0, 10.0, 10.0], rel=1e-4)  # counts times the sharpness
    assert count_information(excess.detach(), 1.0).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-7)


@given(
    st.integers(0, 50),
    st.floats(0.01, 100.0),
    st.floats(-5.0, 20.0, allow_subnormal=False),
    st.floats(-5.0, 20.0, allow_subnormal=False),
)
def test_log_likelihood_is_concave(count: int, dose: float, first: float, second: float) -> None:
    excess = dose * torch.tensor([first, second, 0.5 * (first + second)], dtype=torch.float64)
    low, high, middle = count_log_likelihood(torch.full((3,), float(count), dtype=torch.float64), excess, dose).tolist()
    assert middle >= 0.5 * (low + high) - 1e-6 * (1 + abs(low) + abs(high))  # log is 3e-7 off where the tail begins


def test_counts_are_recognised() -> None:
    check_counts(torch.tensor([[[0.0, 1.0], [7.0, 250.0]]]))
    for value, shown in ((-1.0, "-1"), (0.37, "0.37"), (math.nan, "nan"), (math.inf, "inf")):
        images = torch.ones(3, 2, 2)
        images[1, 0, 1] = value
        with pytest.raises(DataError, match=rf"DATA120: image 12 has a pixel of {shown}, expected counts"):
            check_counts(images, first=10)


@pytest.mark.parametrize("dose", [0.0, -1.0, math.nan, math.inf])
def test_a_dose_that_cannot_be(dose: float) -> None:
    x = torch.zeros(2)
    for call in (
        lambda: electron_rate(x, dose),
        lambda: count_log_likelihood(x, x, dose),
        lambda: count_information(x, dose),
    ):
        with pytest.raises(DataError, match=r"DATA121: a dose of .* electrons per pixel, expected more than 0"):
            call()
