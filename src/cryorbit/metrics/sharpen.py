"""Sharpening of a final map: the falloff of its amplitudes is fitted and undone, and each shell weighed by what the halves agree on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.metrics.fsc import resolution, shell_power
from cryorbit.physics.fourier import fourier_to_volume, shell_index, volume_to_fourier

_COARSEST = 10.0  # angstrom: shape rather than the falloff of atoms rules the amplitudes below this
_FEWEST_SHELLS = 5


@dataclass(frozen=True)
class Sharpened:
    """A sharpened map and the B-factor that was undone, square angstrom; 0 where too few shells were left to fit one."""

    data: Float[Tensor, "d d d"]
    b_factor: float


def sharpen(
    half_1: Float[Tensor, "d d d"],
    half_2: Float[Tensor, "d d d"],
    mask: Float[Tensor, "d d d"],
    correlation: Float[Tensor, " shells"],
    pixel_size: float,
) -> Sharpened:
    """Mean of two halves, weighted by FSC and freed of its B-factor (Rosenthal and Henderson 2003, eq. 10 and 16).

    Amplitudes are multiplied by ``sqrt(2 FSC / (1 + FSC)) exp(B s^2 / 4)`` up to the resolution (FSC 0.143), nothing is kept beyond. B is the
    least-squares slope of ``ln <|F|>`` of the masked and weighted map over ``s^2`` between 10 angstrom and the resolution, never below 0.

    Parameters
    ----------
    half_1, half_2
        (D, D, D) unfiltered maps.
    mask
        (D, D, D) soft mask of the molecule, for the fit alone.
    correlation
        (D // 2 + 1,) FSC of the halves, corrected for the mask.
    pixel_size
        Angstrom.
    """
    box = half_1.shape[-1]
    mean = 0.5 * (half_1 + half_2).to(torch.float64)
    limit = resolution(correlation, 0.143, box, pixel_size)
    frequency = torch.arange(len(correlation), dtype=torch.float64) / (box * pixel_size)
    positive = correlation.to(torch.float64).clamp(0.0, 1.0)
    weight = torch.where(frequency <= 1 / limit + 1e-9, (2 * positive / (1 + positive)).sqrt(), 0.0)
    amplitude = weight * shell_power(mean * mask).sqrt()
    fitted = (frequency >= 1 / _COARSEST) & (amplitude > 0)
    b_factor = 0.0
    if int(fitted.sum()) >= _FEWEST_SHELLS:
        x, y = frequency[fitted].square(), amplitude[fitted].log()
        x = x - x.mean()
        b_factor = max(0.0, -4 * float((x * y).sum() / x.square().sum()))
    gain = weight * (0.25 * b_factor * frequency.square()).exp()
    past = torch.cat([gain, gain.new_zeros(1)])  # for what lies beyond the last shell, in the corners
    filtered = fourier_to_volume(
        volume_to_fourier(mean) * past[shell_index(box, mean.device).clamp(max=len(gain))], box
    )
    return Sharpened(filtered.to(half_1.dtype), b_factor)
