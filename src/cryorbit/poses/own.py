"""Dense posterior of in-plane poses where every image is compared with a picture of its own; differentiable.

``poses/grid.py`` compares all images with all slices. Here image i has slices of its own, of one picture at half a turn of angles: the
likelihood is the same, and what is predicted for each image can be learnt by its gradient.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.shift import phase_ramp
from cryorbit.poses.grid import ShiftGrid


@dataclass(frozen=True)
class OwnPosterior:
    """Posterior of a batch over angles x shifts.

    Attributes
    ----------
    scores
        (B, S, 2 A) log of likelihood over that of noise alone times prior, nats; from A on the half turns.
    slices
        (B, A, P) what they were compared with, without CTF.
    shifted
        (B, S, P) the images times their CTF, shifted back by every trial shift.
    """

    scores: Float[Tensor, "b s g"]
    slices: Complex[Tensor, "b a p"]
    shifted: Complex[Tensor, "b s p"]

    @property
    def log_evidence(self) -> Float[Tensor, " b"]:
        """Log marginal likelihood over that of noise alone, nats; differentiable in what the slices were made of."""
        return self.scores.flatten(1).logsumexp(dim=1)

    def chances(self) -> Float[Tensor, "b s g"]:
        """Posterior probability of every pose."""
        return self.scores.flatten(1).softmax(dim=1).view_as(self.scores)

    @torch.no_grad()
    def residual(self, images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"]) -> Float[Tensor, " p"]:
        """Sum over images of the posterior mean of ``|y - c e s|^2``."""
        upright, over = self.chances().chunk(2, dim=-1)
        even = (upright + over).mT @ self.shifted.real
        odd = (upright - over).mT @ self.shifted.imag  # half a turn conjugates a slice
        cross = (self.slices.real * even + self.slices.imag * odd).sum(dim=1)
        energy = ((upright + over).sum(dim=1)[..., None] * self.slices.abs().square()).sum(dim=1)
        return (images.abs().square() - 2 * cross + ctf.square() * energy).sum(dim=0)


def own_posterior(
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    slices: Complex[Tensor, "b a p"],
    precision: Float[Tensor, " p"],
    shifts: ShiftGrid,
    disk: FourierDisk,
) -> OwnPosterior:
    """Every image against its own slices, their half turns, and all shifts.

    Parameters
    ----------
    images, ctf
        (B, P) Fourier pixels and CTF.
    slices
        (B, A, P) transforms of each image's picture turned by half a turn of angles.
    precision
        (P,) pixel multiplicity over noise variance.
    shifts
        Trial shifts in pixels of ``disk.box``.
    disk
        The Fourier pixels.
    """
    shifted = (images * ctf)[:, None] * phase_ramp(shifts.points.to(images.device), disk).conj()
    weighted = slices * precision
    even = shifted.real @ weighted.real.mT
    odd = shifted.imag @ weighted.imag.mT
    power = 0.5 * ((precision * ctf.square())[:, None] * slices.abs().square()).sum(dim=-1)
    prior = shifts.log_prior.to(power)[:, None] - math.log(2 * slices.shape[1])
    base = prior - power[:, None]
    return OwnPosterior(torch.cat([base + even + odd, base + even - odd], dim=-1), slices, shifted)
