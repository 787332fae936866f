"""Local resolution: found where it was put, and what equal or unrelated halves give."""

import pytest
import torch

from cryorbit.metrics.local_resolution import local_resolution
from cryorbit.metrics.masks import lowpass

BOX, PIXEL = 64, 2.0


def white(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(BOX, BOX, BOX, generator=generator)


def test_a_map_that_is_sharp_on_one_side_and_noisy_on_the_other(generator):
    """Signal to Nyquist at x < D / 2, to 8 angstrom beyond; noise that says nothing about it elsewhere."""
    signal, coarse = white(generator), 4.0
    smooth = lowpass(signal, coarse, width_shells=1.0)
    left = (torch.arange(BOX) < BOX // 2).float()
    halves = [
        left * (signal + 0.2 * white(generator))
        + (1 - left)
        * (smooth + 0.2 * lowpass(white(generator), coarse) + 1.0 * (n - lowpass(n, coarse, width_shells=1.0)))
        for n in (white(generator), white(generator))
    ]
    found = local_resolution(*halves, PIXEL)
    assert float(found[:, :, 10:22].median()) == pytest.approx(2 * PIXEL)
    assert float(found[:, :, 42:54].median()) == pytest.approx(coarse * PIXEL, rel=0.15)


def test_equal_halves_reach_nyquist_and_unrelated_ones_nothing(generator):
    one, two = white(generator), white(generator)
    assert float(local_resolution(one, one, PIXEL).max()) == pytest.approx(2 * PIXEL)
    assert float(local_resolution(one, two, PIXEL).median()) > 0.5 * BOX * PIXEL / 4


def test_scale_of_either_half_does_not_matter(generator):
    one = white(generator)
    two = one + 1.5 * white(generator)
    torch.testing.assert_close(
        local_resolution(one, two, PIXEL), local_resolution(3 * one, 0.2 * two, PIXEL), atol=0.05, rtol=0.01
    )
