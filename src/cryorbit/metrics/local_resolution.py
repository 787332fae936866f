"""Local resolution: where in the map, and to which spacing, two half maps agree."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier

_WIDTH = 0.2  # of a band's frequency, full width at half height: about two hundred independent numbers in each window
_PERIODS = 1.5  # standard deviation of the Gaussian window
_BANDS_PER_OCTAVE = 8
_COARSEST = 4.0  # Fourier periods per box: below that a window is most of the map


def local_resolution(
    half_1: Float[Tensor, "d d d"],
    half_2: Float[Tensor, "d d d"],
    pixel_size: float,
    threshold: float = 0.143,
) -> Float[Tensor, "d d d"]:
    """Spacing at which the local correlation of two half maps first falls below ``threshold``.

    Both halves are filtered to bands of one relative width; each band's correlation is taken under a Gaussian window of one and a half of
    its periods, so that every number rests on as many independent ones (about two hundred). Between bands the logarithm of the spacing is
    interpolated.

    Parameters
    ----------
    half_1, half_2
        (D, D, D) independent, unfiltered half maps.
    pixel_size
        Angstrom.
    threshold
        Correlation.

    Returns
    -------
    (D, D, D) angstrom, from Nyquist to a quarter of the box (where nothing agrees at any band).
    """
    box = half_1.shape[-1]
    first, second = (volume_to_fourier(v.to(torch.float32)) for v in (half_1, half_2))
    shell = shell_index(box, half_1.device).to(torch.float32)
    count = max(2, math.ceil(_BANDS_PER_OCTAVE * math.log2(0.5 * box / _COARSEST)) + 1)
    centres = torch.logspace(math.log10(_COARSEST), math.log10(0.5 * box), count).tolist()
    out = torch.full_like(half_1, 2 * pixel_size, dtype=torch.float32)
    alive = torch.ones_like(out, dtype=torch.bool)
    before, previous = torch.ones_like(out), centres[0]
    for centre in centres:
        band = torch.exp(-4 * math.log(2) * ((shell - centre) / (_WIDTH * centre)).square())
        a, b = (fourier_to_volume(f * band, box) for f in (first, second))
        window = torch.exp(-2 * (math.pi * _PERIODS / centre * shell).square())
        cross, power_a, power_b = (fourier_to_volume(volume_to_fourier(x) * window, box) for x in (a * b, a * a, b * b))
        here = cross / (power_a.clamp_min(0) * power_b.clamp_min(0)).sqrt().clamp_min(1e-30)
        falls = alive & (here < threshold)
        part = ((before - threshold) / (before - here).clamp_min(1e-6)).clamp(0, 1)
        reached = math.log(previous) + part * (math.log(centre) - math.log(previous))
        out = torch.where(falls, box * pixel_size / reached.exp(), out)
        alive &= ~falls
        before, previous = here, centre
    return out
