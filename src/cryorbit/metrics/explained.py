"""How much of the images' signal a map leaves unexplained: what no agreement of halves can tell."""

import torch
from jaxtyping import Float
from torch import Tensor

_FIRST = 2  # shells below hold the images' mean and the background's gradient
_FAINTEST = 0.02  # of the noise, averaged over shells: less signal is none


def unexplained(
    image: Float[Tensor, " s"],
    background: Float[Tensor, " s"],
    residual: Float[Tensor, " s"],
    pixels: Float[Tensor, " s"],
) -> float | None:
    """Share of the images' signal power that is still in the residual.

    The background around particles is noise alone, so ``image - background`` is the power of what particles show and ``residual -
    background`` the part of it that the map at the given poses does not. Shells are weighed by signal over squared noise, as in a regression
    of the second on the first. One molecule leaves next to nothing, at whatever noise; two in one set leave what they do not share.

    Parameters
    ----------
    image, background, residual
        Power per shell of the images, of the noise around the particles, and of images less the map's projections.
    pixels
        Fourier pixels in each shell.

    Returns
    -------
    0 for a map that explains all, 1 for one that explains nothing; below 0 where it fits noise too. None where no signal stands out.
    """
    inside = (torch.arange(len(image)) >= _FIRST) & (background > 0)
    image, background, residual, pixels = (x[inside].double() for x in (image, background, residual, pixels))
    signal = (image - background) / background
    weight = pixels * signal
    if not len(signal) or float((weight * signal).sum() / pixels.sum()) < _FAINTEST**2:
        return None
    return float((weight * (residual - background) / background).sum() / (weight * signal).sum())
