"""How much of the images' signal a map leaves unexplained: what no agreement of halves can tell."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_FIRST = 2  # shells below hold the images' mean and the background's gradient
_CLEAR = 3.0  # standard errors by which signal must stand out of the background; the first shell where it does not is the end
_UNSURE = 0.05  # a standard error above: nothing can be said
_BLIND = -0.05  # a share below: what is taken for background holds signal, and nothing can be said


@dataclass(frozen=True)
class Unexplained:
    """Share of the signal that is left in the residual, and the standard error of that number."""

    share: float
    error: float


def unexplained(
    image: Float[Tensor, " s"],
    background: Float[Tensor, " s"],
    residual: Float[Tensor, " s"],
    pixels: Float[Tensor, " s"],
    images: float,
) -> Unexplained | None:
    """Share of the images' signal power that is still in the residual.

    The background around particles is noise alone, so ``image - background`` is the power of what particles show and ``residual -
    background`` the part of it that the map at the given poses does not. Shells are weighed by signal over squared noise, as in a regression
    of the second on the first, up to the first one in which signal no longer stands out: beyond, errors of the background would count as
    signal in both.

    Parameters
    ----------
    image, background, residual
        Power per shell of the images, of the noise around the particles, and of images less the map's projections.
    pixels
        Fourier pixels in each shell.
    images
        As many images as the background amounts to: their number times the share of their area that is background.

    Returns
    -------
    0 for a map that explains all, 1 for one that explains nothing, a little below 0 where it fits noise too. None where signal does not
    stand out well enough, or so much of it was spread over the background that the share is far below 0.
    """
    inside = (torch.arange(len(image)) >= _FIRST) & (background > 0)
    image, background, residual, pixels = (x[inside].double() for x in (image, background, residual, pixels))
    signal = (image - background) / background
    scatter = (2 / (pixels * images)).sqrt()  # of the background, relative
    clear = (signal > _CLEAR * scatter).to(torch.int64).cumprod(0).bool()
    if not bool(clear.any()):
        return None
    signal, scatter, weight = signal[clear], scatter[clear], (pixels * signal)[clear]
    left = ((residual - background) / background)[clear]
    total = float((weight * signal).sum())
    share = float((weight * left).sum()) / total
    error = float((weight * scatter).square().sum().sqrt()) / total
    return None if error > _UNSURE or share < _BLIND else Unexplained(share, error)
