"""How far pictures and in-plane angles are from the truth: several normalisations side by side, because papers/004 states none."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.groups.so2 import SO2


def picture_errors(found: Float[Tensor, "n d d"], truth: Float[Tensor, "n d d"]) -> dict[str, float]:
    """Mean and worst over pictures of the squared error: ``sse`` summed over pixels, ``pixel`` their mean, ``relative`` the sum over what
    the mean of all true pictures would leave (1: no better than that)."""
    sse = (found - truth).double().square().sum(dim=(1, 2))
    blank = float((truth - truth.mean(dim=0)).double().square().sum(dim=(1, 2)).mean())
    out = {}
    for name, scale in (("sse", 1.0), ("pixel", float(truth[0].numel())), ("relative", max(blank, 1e-30))):
        out[f"{name}_mean"], out[f"{name}_worst"] = float(sse.mean()) / scale, float(sse.max()) / scale
    return out


def angle_errors(found: Float[Tensor, " n"], truth: Float[Tensor, " n"], *, free: bool = False) -> dict[str, float]:
    """Median (degrees) and mean square (radian^2) of the distance between angles, the short way round.

    ``free``: after the one turn that fits most pictures best, for methods that cannot know which way up is; it is returned as ``offset``.
    """
    offset = 0.0
    if free:
        trial = torch.arange(720) * (2 * math.pi / 720)
        apart = SO2().distance((found - truth)[:, None].double(), trial.double())
        offset = float(trial[apart.median(dim=0).values.argmin()])
    error = SO2().distance(found.double() - offset, truth.double())
    return {
        "median_deg": math.degrees(float(error.median())),
        "mean_square_rad2": float(error.square().mean()),
        "offset": offset,
    }
