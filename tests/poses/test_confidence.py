"""Chances of being right: calibrated where the truth is logistic, cautious where nothing is wrong, and a line that keeps its promise."""

import pytest
import torch

from cryorbit.poses.confidence import fit_confidence, threshold


def observations(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 2, generator=generator) * torch.tensor([1.0, 30.0]) + torch.tensor([5.0, -100.0])
    chance = torch.sigmoid(2.0 * (x[:, 0] - 4.5) + 0.05 * (x[:, 1] + 100))
    return x, torch.rand(count, generator=generator) < chance


def test_stated_chance_is_the_share_that_is_right(generator):
    fitted = fit_confidence(*observations(2000, generator))
    x, right = observations(5000, generator)
    stated = fitted(x)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        there = (stated >= low) & (stated < low + 0.2)
        assert float(right[there].double().mean()) == pytest.approx(float(stated[there].mean()), abs=0.08)


def test_nothing_wrong_in_few_observations_is_no_certainty(generator):
    x = torch.randn(50, 3, generator=generator)
    every = torch.ones(50, dtype=torch.bool)
    stated = fit_confidence(x, every)(x)
    assert 0.9 < float(stated.median()) < 0.995
    assert float(fit_confidence(x, ~every)(x).median()) < 0.1


def test_threshold_is_the_lowest_that_keeps_the_share_wanted(generator):
    fitted = fit_confidence(*observations(2000, generator))
    x, right = observations(5000, generator)
    stated = fitted(x)
    line = threshold(stated, right, 0.95)
    assert float(right[stated >= line].double().mean()) >= 0.95
    assert float(right[stated >= line - 0.1].double().mean()) < 0.95
    assert threshold(stated, torch.zeros_like(right), 0.95) == 1.0
    assert threshold(stated.clamp_min(0.9), torch.ones_like(right), 0.95) == 0.5
