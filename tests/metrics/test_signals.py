"""Errors up to a shift: zero for the truth moved, known for a known difference, the frame of a density found from moments."""

import pytest
import torch
from torch.autograd import gradcheck

from cryorbit.metrics.signals import FINE, align_signal, frame_shift, signal_error
from cryorbit.physics.moments import analytic_moments
from cryorbit.physics.mra import shift_signal
from cryorbit.simulate.mra import Mixtures


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    signals, densities = Mixtures(components=3).draw(1, generator)
    return signals[0], densities[0]


def test_a_shifted_truth_has_no_error(pair):
    assert float(signal_error(pair[0].roll(7), pair[0])) < 1e-12
    assert float(signal_error(1.1 * pair[0].roll(7), pair[0])) == pytest.approx(0.1)


def test_grid_shifts_leave_an_error_that_continuous_ones_do_not(pair):
    moved = shift_signal(pair[0], torch.tensor(3.45, dtype=torch.float64))
    assert float(signal_error(moved, pair[0])) > 0.03
    assert float(signal_error(moved, pair[0], FINE)) < 1e-10
    torch.testing.assert_close(align_signal(moved, pair[0]), pair[0])


def test_a_mirrored_signal_is_not_the_same(pair):
    assert float(signal_error(pair[0].flip(0), pair[0], FINE)) > 0.05


def test_gradcheck(pair, generator):
    start = (pair[0] + 0.1 * torch.randn(41, generator=generator, dtype=torch.float64)).requires_grad_()
    assert gradcheck(lambda v: signal_error(v, pair[0]), (start,))


def test_density_is_put_into_the_frame_of_the_signal(pair):
    signal, density = pair
    given = analytic_moments(signal, density)
    assert frame_shift(signal.roll(4), density.roll(11), given) == 41 - 15
