"""What a map's posterior says of its resolution, without half-sets: the spectral signal-to-noise ratio of papers/002 section 6.2.

With a prior of variance t and noise of variance s in each coefficient, the posterior mean has the power ``t^2 / (t + s)`` and the variance
``t s / (t + s)``: their ratio is ``alpha = t / s``. From it follow the correlations one would measure: ``alpha / (1 + alpha)`` between two
maps of as many particles each (what papers/002 compares with FSC), its root between this map and the truth, ``alpha / (2 + alpha)``
between maps of half the particles. FSC 0.143 between halves, 0.5 to the truth and ``alpha = 1/3`` are one resolution (Rosenthal and
Henderson 2003).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.metrics.fsc import resolution, shell_sum
from cryorbit.physics.fourier import shell_index, volume_to_fourier

_MOST = 1e6


def ss_snr(mean: Float[Tensor, "d d d"], variance: Float[Tensor, "d d h"]) -> Float[Tensor, " shells"]:
    """Spectral-shell signal-to-noise ratio ``alpha = sum |mean|^2 / sum variance`` over each shell (papers/002 eq. 19).

    Parameters
    ----------
    mean
        (D, D, D) posterior mean.
    variance
        (D, D, D // 2 + 1) of its coefficients; 0 where there are none, which then count in neither sum.

    Returns
    -------
    (D // 2 + 1,) at most 1e6; 0 in shells without coefficients.
    """
    box = mean.shape[-1]
    if variance.shape != (box, box, box // 2 + 1):
        raise DataError("DATA231", f"variances of shape {tuple(variance.shape)} do not belong to a map of {box} pixels")
    index, used = shell_index(box, mean.device), variance > 0
    power = volume_to_fourier(mean.double()).abs().square()
    signal, noise = (shell_sum(torch.where(used, x.double(), 0.0), index, box) for x in (power, variance))
    return torch.where(noise > 0, signal / noise.clamp_min(1e-300), 0.0).clamp(max=_MOST)


def full_set_fsc(alpha: Float[Tensor, " shells"]) -> Float[Tensor, " shells"]:
    """``alpha / (1 + alpha)``: the correlation of two maps of as many particles each (papers/002 section 6.2)."""
    return alpha / (1 + alpha)


def truth_fsc(alpha: Float[Tensor, " shells"]) -> Float[Tensor, " shells"]:
    """``sqrt(alpha / (1 + alpha))``: the correlation of this map with the truth."""
    return full_set_fsc(alpha).sqrt()


def half_set_fsc(alpha: Float[Tensor, " shells"]) -> Float[Tensor, " shells"]:
    """``alpha / (2 + alpha)``: the correlation of maps of half the particles each, what half-sets would measure."""
    return alpha / (2 + alpha)


def predicted_resolution(alpha: Float[Tensor, " shells"], box: int, pixel_size: float) -> float:
    """Resolution in angstrom at which half-sets would correlate by 0.143, from all particles at once.

    Parameters
    ----------
    alpha
        (box // 2 + 1,). The last shell of an even box, which images below Nyquist hardly fill, counts as the one before.
    box, pixel_size
        Pixels and angstrom per pixel of the map.
    """
    curve = half_set_fsc(alpha).clone()
    if box % 2 == 0:
        curve[-1] = curve[-2]
    return resolution(curve, 0.143, box, pixel_size)


def in_mask(alpha: Float[Tensor, " shells"], mask: Float[Tensor, "d d d"]) -> Float[Tensor, " shells"]:
    """The ratio inside a soft mask that holds all of the molecule: noise is alike everywhere, so only its share ``mean(mask^2)`` is left."""
    return (alpha / mask.double().square().mean().clamp_min(1e-6)).clamp(max=_MOST)
