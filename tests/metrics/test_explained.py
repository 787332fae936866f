"""How much signal a map leaves: of the right map nothing, of half a map its half, of noise no answer."""

import pytest
import torch

from cryorbit.metrics.explained import unexplained

SHELLS = 24
PIXELS = 2 * torch.pi * torch.arange(SHELLS)
SIGNAL = 3.0 * torch.exp(-torch.arange(SHELLS) / 4.0)
NOISE = 1.0 + 4.0 / (1 + torch.arange(SHELLS))


@pytest.mark.parametrize("left", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("unit", [1.0, 1e-6])
def test_the_share_that_is_left(left: float, unit: float) -> None:
    found = unexplained(unit * (NOISE + SIGNAL), unit * NOISE, unit * (NOISE + left * SIGNAL), PIXELS)
    assert found == pytest.approx(left, abs=1e-4)


def test_a_map_that_fits_noise_leaves_less_than_nothing() -> None:
    found = unexplained(NOISE + SIGNAL, NOISE, 0.95 * NOISE, PIXELS)
    assert found is not None
    assert found < -0.02


def test_first_shells_have_no_say() -> None:
    image, background, residual = NOISE + SIGNAL, NOISE.clone(), NOISE.clone()
    background[0], residual[1] = 0.0, 1e6
    assert unexplained(image, background, residual, PIXELS) == pytest.approx(0.0, abs=1e-6)


def test_noise_alone_has_no_signal_to_explain(generator: torch.Generator) -> None:
    scatter = 1 + 0.01 * torch.randn(2, SHELLS, generator=generator)
    assert unexplained(NOISE * scatter[0], NOISE * scatter[1], NOISE, PIXELS) is None
