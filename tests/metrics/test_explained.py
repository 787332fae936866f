"""How much signal a map leaves: of the right map nothing, of half a map its half, of noise no answer."""

import pytest
import torch

from cryorbit.metrics.explained import unexplained

SHELLS, IMAGES = 24, 200.0
PIXELS = 2 * torch.pi * torch.arange(SHELLS)
SIGNAL = 3.0 * torch.exp(-torch.arange(SHELLS) / 4.0)
NOISE = 1.0 + 4.0 / (1 + torch.arange(SHELLS))


@pytest.mark.parametrize("left", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("unit", [1.0, 1e-6])
def test_the_share_that_is_left(left: float, unit: float) -> None:
    found = unexplained(unit * (NOISE + SIGNAL), unit * NOISE, unit * (NOISE + left * SIGNAL), PIXELS, IMAGES)
    assert found is not None
    assert found.share == pytest.approx(left, abs=1e-4)
    assert 0 < found.error < 0.02


def test_a_map_that_fits_noise_leaves_less_than_nothing() -> None:
    found = unexplained(NOISE + SIGNAL, NOISE, 0.993 * NOISE, PIXELS, IMAGES)
    assert found is not None
    assert -0.05 < found.share < -0.005


def test_signal_taken_for_background_leaves_no_answer() -> None:
    assert unexplained(NOISE + SIGNAL, NOISE + 0.2 * SIGNAL, NOISE, PIXELS, IMAGES) is None


def test_first_shells_have_no_say() -> None:
    image, background, residual = NOISE + SIGNAL, NOISE.clone(), NOISE.clone()
    background[0], residual[1] = 0.0, 1e6
    found = unexplained(image, background, residual, PIXELS, IMAGES)
    assert found is not None
    assert found.share == pytest.approx(0.0, abs=1e-6)


def measured(signal: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Power of images and of their background as so many of them would show it."""
    scatter = (2 / (PIXELS.clamp_min(1) * IMAGES)).sqrt()
    image, background = (1 + scatter * torch.randn(SHELLS, generator=generator) for _ in range(2))
    return (NOISE + signal * SIGNAL) * image, NOISE * background


@pytest.mark.parametrize("signal", [1.0, 0.3, 0.1, 0.03, 0.0])
def test_the_right_map_is_not_blamed_for_faint_signal(signal: float, generator: torch.Generator) -> None:
    found = [unexplained(*measured(signal, generator), NOISE, PIXELS, IMAGES) for _ in range(200)]
    blamed = [one is not None and one.share - 2 * one.error > 0.03 for one in found]
    assert sum(blamed) < 6
    if signal == 1.0:
        assert all(one is not None for one in found)
