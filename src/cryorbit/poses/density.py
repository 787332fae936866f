"""Densities on rotations that networks are fitted to: concentrated about one rotation, equally about every axis, and mixtures of these."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.poses.encoder import EncodedPoses

SHIFT_SD = 0.5
"""Pixels of what the encoder sees, within which a shift counts as found."""
_ANGLES, _REACH = 257, 6.0  # of the table that angles are drawn by, and its width in standard deviations about an axis


def log_concentrated(cosine: Float[Tensor, "*b"], concentration: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Log density at an angle from the centre, relative to the uniform distribution (isotropic matrix Fisher).

    ``p = exp(x (cos angle - 1)) / (I0e(x) - I1e(x))``: x is 1 / variance about each axis (radian) where it is large, and 0 is uniform.

    Parameters
    ----------
    cosine
        Of the angle between the rotations.
    concentration
        x, 1 / radian^2, not negative.
    """
    x = concentration.to(torch.float64)
    norm = torch.special.i0e(x) - torch.special.i1e(x)
    return x * (cosine.to(torch.float64) - 1) - norm.log()


def drawn(
    rotations: Float[Tensor, "*b 3 3"], concentration: Float[Tensor, "*b"], generator: torch.Generator
) -> Float[Tensor, "*b 3 3"]:
    """One rotation from the density of :func:`log_concentrated` about each of the ``rotations``; differentiable in both (pathwise).

    The axis is uniform. The angle's distribution function, of ``exp(x (cos angle - 1)) (1 - cos angle)``, is summed on a grid of angles as wide
    as x leaves it and inverted at a uniform number, so gradients pass through the table.

    Parameters
    ----------
    rotations, concentration
        (..., 3, 3) centres, and x (...), 1 / radian^2, positive.
    generator
        Of axes and uniform numbers, on the CPU.
    """
    x = concentration[..., None]
    share = torch.linspace(0, 1, _ANGLES, device=x.device, dtype=x.dtype)
    angle = (_REACH / x.sqrt()).clamp(max=math.pi) * share
    density = (x * (angle.cos() - 1)).exp() * torch.sin(0.5 * angle).square()
    upto = torch.cumulative_trapezoid(density, angle, dim=-1)
    upto = torch.cat([torch.zeros_like(x), upto / upto[..., -1:]], dim=-1)
    uniform = torch.rand(*x.shape, generator=generator).to(x)
    above = torch.searchsorted(upto.detach().contiguous(), uniform).clamp(1, _ANGLES - 1)
    (low, high), (first, last) = ((y.gather(-1, above - 1), y.gather(-1, above)) for y in (upto, angle))
    turn = first + (uniform - low) / (high - low) * (last - first)
    axis = torch.randn(*concentration.shape, 3, generator=generator).to(x)
    return so3.exp(turn * axis / axis.norm(dim=-1, keepdim=True)) @ rotations


def cosines(
    found: Float[Tensor, "b h 3 3"], label: Float[Tensor, "b 3 3"], symmetry: Float[Tensor, "s 3 3"]
) -> Float[Tensor, "b h"]:
    """Cosine of the angle from each of the rotations ``found`` to the nearest equivalent of the label."""
    mates = label[:, None] @ symmetry.to(label)
    trace = torch.einsum("bhij,bsij->bhs", found, mates)
    return 0.5 * (trace.amax(dim=2) - 1)


def log_mixture(
    found: EncodedPoses,
    rotations: Float[Tensor, "b 3 3"],
    shifts: Float[Tensor, "b 2"],
    symmetry: Float[Tensor, "s 3 3"],
    shift_sd: float,
) -> Float[Tensor, " b"]:
    """Log density of one pose per image under the mixture of its candidates; shifts normal with ``shift_sd`` pixels about each."""
    of_rotation = log_concentrated(cosines(found.rotations, rotations, symmetry), found.concentration)
    of_shift = -0.5 * ((found.shifts - shifts[:, None]) / shift_sd).square().sum(dim=2)
    return (found.log_weight + of_rotation + of_shift).logsumexp(dim=1)
