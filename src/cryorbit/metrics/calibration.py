"""Whether a map's posterior means what it says: how often the truth is inside its credible intervals."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.metrics.fsc import shell_sum
from cryorbit.physics.fourier import shell_index, volume_to_fourier


@dataclass(frozen=True)
class Coverage:
    """Share of true coefficients inside their intervals: ``overall`` and ``by_shell`` (shells,), NaN in shells without any."""

    by_shell: Float[Tensor, " shells"]
    overall: float


def interval_coverage(
    mean: Float[Tensor, "d d d"], variance: Float[Tensor, "d d h"], truth: Float[Tensor, "d d d"], level: float = 0.9
) -> Coverage:
    """How often the real and imaginary parts of the true coefficients lie inside the central credible intervals of mass ``level``.

    Parameters
    ----------
    mean, truth
        (D, D, D) posterior mean and the true map, in one frame and scale.
    variance
        (D, D, D // 2 + 1) complex variance of each coefficient; where it is 0 there is no coefficient and nothing is counted. Nor are
        the eight that are their own mates: they have no imaginary part.
    level
        Mass of an interval.
    """
    box = mean.shape[-1]
    half_width = math.sqrt(2) * float(torch.special.erfinv(torch.tensor(level, dtype=torch.float64)))
    error = volume_to_fourier((mean - truth).double())
    used = (variance > 0) & ~_own_mate(box, mean.device)
    limit = half_width * (0.5 * variance.double()).sqrt()
    inside = 0.5 * ((error.real.abs() < limit).double() + (error.imag.abs() < limit).double())
    index = shell_index(box, mean.device)
    hits, count = (shell_sum(torch.where(used, x, 0.0), index, box) for x in (inside, torch.ones_like(inside)))
    return Coverage(hits / count, float(hits.sum() / count.sum()))


def _own_mate(box: int, device: torch.device) -> Tensor:
    axis = torch.arange(box, device=device)
    own = (2 * axis) % box == 0
    return own[:, None, None] & own[:, None] & own[: box // 2 + 1]
