"""Image shifts as phase ramps."""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk


def phase_ramp(shifts_px: Float[Tensor, "*b 2"], disk: FourierDisk) -> Complex[Tensor, "*b p"]:
    """Factor that moves an image by ``shifts_px`` (x, y) pixels: ``exp(-2 pi i k.s / D)``, so that ``image(x) = P(x - s)``.

    Parameters
    ----------
    shifts_px
        (..., 2) shift (x, y) in pixels; differentiable.
    disk
        Fourier pixels to evaluate on.
    """
    k = disk.k.to(dtype=shifts_px.dtype, device=shifts_px.device)
    angle = (-2 * math.pi / disk.box) * (shifts_px @ k.mT)
    return torch.polar(torch.ones_like(angle), angle)
