"""Masks: where they are one, where they are zero, and that a molecule lies inside its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.metrics.masks import lowpass, mask_from_map, otsu, soft_sphere


@pytest.mark.parametrize("box", [32, 33])
def test_sphere_is_one_inside_zero_outside_and_half_in_the_middle_of_its_edge(box: int) -> None:
    mask, c = soft_sphere(box, 8.0, 4.0), box // 2
    assert float(mask[c, c, c + 8]) == 1.0
    assert float(mask[c, c - 10, c]) == pytest.approx(0.5)
    assert float(mask[c + 12, c, c]) == pytest.approx(0.0, abs=1e-6)
    volume = 4 / 3 * torch.pi * 10.0**3
    assert float(mask.sum()) == pytest.approx(volume, rel=0.03)


def test_sphere_needs_a_radius() -> None:
    with pytest.raises(DataError, match="DATA203"):
        soft_sphere(16, 0.0)


def test_otsu_splits_two_heaps() -> None:
    low, high = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1))
    values = torch.cat([low, high + 10]).numpy()
    assert 3 < otsu(values) < 7


def test_molecule_lies_inside_its_mask_and_noise_outside(
    generator: torch.Generator, atoms: Tensor, draw_atoms: Callable[..., Tensor]
) -> None:
    volume = draw_atoms(atoms * 0.7, 48)  # the balls' tails reach beyond any mask
    noisy = volume + 0.5 * volume.std() * torch.randn(volume.shape, generator=generator)
    mask = mask_from_map(noisy, 2.0)
    assert float((volume * mask).sum() / volume.sum()) > 0.97
    assert float(mask.mean()) < 0.2
    assert float(mask.max()) == 1.0
    assert float(mask.min()) == 0.0


def test_a_map_without_positive_density_has_no_mask() -> None:
    with pytest.raises(DataError, match="DATA204"):
        mask_from_map(torch.zeros(24, 24, 24), 2.0)


def test_lowpass_keeps_slow_waves_and_drops_fast_ones() -> None:
    axis = torch.arange(32) * 2 * torch.pi / 32
    slow, fast = torch.cos(2 * axis), torch.cos(12 * axis)
    wave = (slow + fast)[:, None, None].expand(32, 32, 32).contiguous()
    expected = slow[:, None, None].expand(32, 32, 32)
    torch.testing.assert_close(lowpass(wave, 32 / 5.0), expected.contiguous(), atol=1e-5, rtol=0)
