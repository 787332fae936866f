"""Where views are missing and what that does to the resolution along each direction, from a map's posterior."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.groups.so3 import healpix_grid, in_plane_count
from cryorbit.metrics.fsc import shell_sum
from cryorbit.physics.fourier import frequencies, shell_index, volume_to_fourier

_HALF_ANGLE = math.radians(20.0)
_ORDER = 2
_UNSEEN = 0.1
_MOST = 1e6


def missing_views(information: Float[Tensor, "d d h"]) -> Float[Tensor, "d d h"]:
    """Information of each coefficient over the mean of its shell: 1 where views are even, 0 where none is; 0 where no shell has any."""
    box = information.shape[0]
    index, used = shell_index(box, information.device), information > 0
    kept = used | (index < box // 2)
    total, count = (shell_sum(x, index, box) for x in (information, kept.to(information)))
    mean = (total / count.clamp_min(1))[index.clamp(max=box // 2)]
    return torch.where((mean > 0) & kept, information / mean.clamp_min(1e-30), 0.0)


def unseen_share(views: Float[Tensor, "d d h"], last: int) -> float:
    """Share of the coefficients up to shell ``last`` that have less than a tenth of their shell's mean information."""
    box = views.shape[0]
    index = shell_index(box, views.device)
    inside = ((index > 0) & (index <= min(last, box // 2 - 1))).to(views)
    hidden, count = (shell_sum(x, index, box).sum() for x in (inside * (views < _UNSEEN), inside))
    return float(hidden / count.clamp_min(1))


def spectrum_by_direction(
    mean: Float[Tensor, "d d d"], variance: Float[Tensor, "d d h"]
) -> tuple[Float[Tensor, "m 3"], Float[Tensor, "m shells"]]:
    """Spectral signal-to-noise ratio (``metrics/spectrum.py``) within 20 degrees of each of 96 directions, as conical FSC, without half-sets.

    Parameters
    ----------
    mean, variance
        (D, D, D) posterior mean and (D, D, D // 2 + 1) variance of its coefficients.

    Returns
    -------
    (M, 3) unit vectors (x, y, z) of the HEALPix grid of order 2 with z >= 0 (opposite directions are one), and (M, D // 2 + 1).
    """
    box, device = mean.shape[-1], mean.device
    every = healpix_grid(_ORDER).view(-1, in_plane_count(_ORDER), 3, 3)[:, 0, 2].to(device)
    directions = every[(every[:, 2] > 1e-6) | ((every[:, 2].abs() <= 1e-6) & (every[:, 1] * math.pi + every[:, 0] > 0))]
    full = frequencies(box, device).float()
    index = shell_index(box, device)
    used = (variance > 0) & (index > 0) & (index <= box // 2)
    z, y, x = torch.meshgrid(full, full, full[: box // 2 + 1].abs(), indexing="ij")
    points = torch.stack([x[used], y[used], z[used]], dim=1)
    points = points / points.norm(dim=1, keepdim=True)
    shell = index[used]
    sums = [volume_to_fourier(mean).abs().square()[used].double(), variance[used].double()]
    curves = []
    for direction in directions.float():
        near = (points @ direction).abs() > math.cos(_HALF_ANGLE)
        signal, noise = (torch.zeros(box // 2 + 1).double().to(device).index_add(0, shell[near], s[near]) for s in sums)
        curves.append(torch.where(noise > 0, signal / noise.clamp_min(1e-300), _MOST).clamp(max=_MOST))
    return directions, torch.stack(curves)
