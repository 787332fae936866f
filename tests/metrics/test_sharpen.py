"""B-factors that were put in are found and undone; nothing is kept where the halves disagree."""

import pytest
import torch

from cryorbit.metrics.fsc import fsc, shell_power
from cryorbit.metrics.sharpen import sharpen
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier

APIX = 1.5


def falling(box: int, b_factor: float, generator: torch.Generator) -> torch.Tensor:
    """400 point atoms in the middle of the box, blurred by ``exp(-B s^2 / 4)``."""
    volume = torch.zeros(box, box, box)
    at = (box // 2 + box / 8 * torch.randn(400, 3, generator=generator)).round().long().clamp(0, box - 1)
    volume.index_put_(tuple(at.T), torch.ones(400), accumulate=True)
    frequency = shell_index(box).double() / (box * APIX)
    return fourier_to_volume(volume_to_fourier(volume.double()) * (-0.25 * b_factor * frequency**2).exp(), box).float()


@pytest.mark.parametrize("box", [48, 49])
@pytest.mark.parametrize("b_factor", [40.0, 120.0])
def test_finds_and_undoes_the_falloff(box, b_factor, generator):
    volume = falling(box, b_factor, generator)
    ones = torch.ones(box // 2 + 1)
    done = sharpen(volume, volume, torch.ones_like(volume), ones, APIX)
    assert done.b_factor == pytest.approx(b_factor, abs=12.0)
    power = shell_power(done.data)[12:-1]
    assert float(power.max() / power.min()) < 3.0
    assert done.data.dtype == volume.dtype


def test_keeps_nothing_beyond_the_resolution_and_weighs_by_fsc(generator):
    volume = falling(48, 200.0, generator)
    halves = [volume + 4 * volume.std() * torch.randn(volume.shape, generator=generator) for _ in range(2)]
    curve = fsc(*halves)
    done = sharpen(halves[0], halves[1], torch.ones_like(volume), curve, APIX)
    last = int(torch.nonzero(curve[1:] < 0.143)[0]) + 1
    assert 2 < last < 24
    assert float(shell_power(done.data)[last:].max()) < 1e-9 * float(shell_power(done.data).max())
    assert done.b_factor >= 0


def test_fits_nothing_to_a_coarse_map(generator):
    volume = falling(48, 0.0, generator)
    curve = torch.where(torch.arange(25) < 5, 1.0, 0.0)  # 48 * 1.5 / 5 = 14.4 angstrom
    assert sharpen(volume, volume, torch.ones_like(volume), curve, APIX).b_factor == 0.0
