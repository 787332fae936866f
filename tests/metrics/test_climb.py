"""Correlations over rotations and shifts are climbed to their maximum, from many starts at once."""

import math

import pytest
import torch
from torch import Tensor

from cryorbit.groups.so3 import distance, exp
from cryorbit.metrics.climb import Slope, climb, correlated
from cryorbit.metrics.resample import spectrum

BOX = 32.0
TURN, SHIFT = exp(torch.tensor([0.2, -0.1, 0.3])), torch.tensor([0.5, -0.8, 0.2])


@pytest.fixture
def measure(generator: torch.Generator):
    """The correlation of twenty atoms, moved, with their own transform where they belong."""
    atoms, axis = 4 * torch.randn(20, 3, generator=generator), torch.arange(-4.0, 5.0)
    k = torch.cartesian_prod(axis, axis, axis[5:])
    shell, unit = k.norm(dim=1).round().long(), -2j * math.pi / BOX
    weight = torch.rand(int(shell.max()) + 1, generator=generator)[shell][None]

    def moved(rotation: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        turned = atoms @ rotation.mT
        waves = torch.exp(unit * ((turned + shift[:, None]) @ k.T))
        by_turn = torch.linalg.cross(turned[:, :, None].expand(-1, -1, len(k), -1), k.expand(len(shift), 20, -1, -1))
        by_turn = unit * (by_turn * waves[..., None]).sum(dim=1)
        return waves.sum(dim=1), torch.cat([by_turn.mT, unit * k.T * waves.sum(dim=1)[:, None]], dim=1)

    reference = moved(TURN[None], SHIFT[None])[0]
    return lambda rotation, shift: correlated(weight, reference, *moved(rotation, shift), shell)


def test_all_starts_reach_the_maximum(measure, generator: torch.Generator) -> None:
    """Which is near the true motion: with power that differs between directions not at it."""
    astray = 0.15 * torch.randn(5, 3, generator=generator)
    start = exp(astray) @ TURN, SHIFT + 4 * astray
    rotation, shift = climb(measure, *start)
    assert float(distance(rotation, rotation[:1].expand_as(rotation)).max()) < 1e-3
    assert float((shift - shift[0]).abs().max()) < 1e-2
    assert float(distance(rotation[0], TURN)) < 0.05
    before, after = measure(*start).gradient, measure(rotation, shift).gradient
    assert float(after.norm(dim=1).max()) < 0.01 * float(before.norm(dim=1).min())


def test_steps_downhill_are_not_taken(measure, generator: torch.Generator) -> None:
    """Far off, where Gauss-Newton steps may overshoot."""
    rotation, shift = exp(1.5 * torch.randn(20, 3, generator=generator)), 5 * torch.randn(20, 3, generator=generator)
    before = measure(rotation, shift).value
    for iterations in (1, 2, 4):
        after = measure(*climb(measure, rotation, shift, iterations)).value
        assert bool((after >= before).all())
        before = after


def test_gradient_and_curvature_are_those_of_the_value(measure) -> None:
    """Finite differences; the curvature by the shift is exact where maps agree in every shell."""

    def value(step: Tensor, turn: Tensor) -> Slope:
        return measure((exp(step[:3]) @ turn)[None], (SHIFT + step[3:])[None])

    away = exp(torch.tensor([0.2, -0.3, 0.1])) @ TURN
    for i in range(6):
        step = torch.zeros(6)
        step[i] = 0.02
        difference = (value(step, away).value - value(-step, away).value) / 0.04
        torch.testing.assert_close(value(0 * step, away).gradient[:, i], difference, rtol=0.01, atol=2.0)
        if i > 2:
            bend = (value(-step, TURN).gradient - value(step, TURN).gradient)[0, 3:] / 0.04
            torch.testing.assert_close(value(0 * step, TURN).curvature[0, i, 3:], bend, rtol=0.01, atol=1.0)


def test_gradient_of_a_spectrum(generator: torch.Generator) -> None:
    """Inside a cell of the grid, between whose points values are linear, differences are exact."""
    read = spectrum(torch.randn(16, 16, 16, generator=generator), 5)
    k = torch.tensor([[1.2, 0.7, -2.3], [-0.4, 3.2, 0.2]])
    values, gradient = read.slope(k)
    torch.testing.assert_close(values, read.at(k))
    for axis in range(3):
        step = torch.zeros(3)
        step[axis] = 0.02
        torch.testing.assert_close(
            gradient[:, axis], (read.at(k + step) - read.at(k - step)) / 0.04, rtol=1e-3, atol=1e-2
        )
