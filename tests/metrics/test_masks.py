"""Masks: where they are one, where they are zero, and that a molecule lies inside its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.metrics.masks import contrast_sign, lowpass, mask_from_map, otsu, soft_sphere
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier
from cryorbit.simulate.atoms import model_path, read_model
from cryorbit.simulate.project_atoms import AtomProjector


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


BOX, APIX = 40, 3.2


@pytest.fixture(scope="module")
def objects() -> dict[str, tuple[Tensor, float]]:
    """Map and particle diameter in angstrom: 4AKE, and a hollow shell of balls of apoferritin's proportions."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(120, 3, generator=generator)
    balls = direction / direction.norm(dim=1, keepdim=True) * (8 + 4 * torch.rand(120, 1, generator=generator))
    axis = torch.arange(BOX, dtype=torch.float32) - BOX // 2
    gz, gy, gx = (torch.exp(-((axis[None] - balls[:, i, None]) ** 2) / 4.5) for i in range(3))
    shell = torch.einsum("nz,ny,nx->zyx", gz, gy, gx)
    model = read_model(model_path("4ake"))
    return {"4ake": (AtomProjector(model, BOX, APIX).volume(), 2 * model.radius), "shell": (shell, 28 * APIX)}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cut", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", ["4ake", "shell"])
def test_contrast_is_told_in_noise_with_and_without_low_frequencies(
    objects: dict[str, tuple[Tensor, float]], name: str, cut: float, masked: bool
) -> None:
    """SNR 0.3 inside the mask; ``cut``: where in cycles per diameter the CTF has halved the amplitude."""
    volume, diameter = objects[name]
    shell = shell_index(BOX).to(torch.float32)
    corner = cut * BOX * APIX / diameter
    gain = (shell > 0) * (shell <= 0.4 * BOX) * shell**2 / (shell**2 + corner**2).clamp_min(1e-6)
    signal = fourier_to_volume(volume_to_fourier(volume) * gain, BOX)
    mask = soft_sphere(BOX, 0.5 * diameter / APIX)
    sigma = (signal[mask == 1].var() / 0.3).sqrt()
    wrong = 0
    for seed in range(8):
        noise = sigma * torch.randn(volume.shape, generator=torch.Generator().manual_seed(seed))
        for sign in (1, -1):
            found = (sign * signal + noise) * (mask if masked else 1.0)
            wrong += contrast_sign(40.0 * found + 7.0, diameter, APIX) != sign
    assert wrong == 0


def test_contrast_of_a_particle_that_fills_its_mask_comes_from_outside() -> None:
    ball = soft_sphere(32, 9.0, 2.0)
    assert contrast_sign(ball, 20.0, 1.0) == 1
    assert contrast_sign(-ball, 20.0, 1.0) == -1
    assert contrast_sign(torch.zeros(32, 32, 32), 20.0, 1.0) == 1
