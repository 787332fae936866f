"""Is there a particle in an image, or something that is not one? A likelihood ratio between two explanations of the same power."""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk

_STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def incoherent_evidence(
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    noise: Float[Tensor, " p"],
    signal: Float[Tensor, " p"],
    disk: FourierDisk,
) -> Float[Tensor, " b"]:
    """Log likelihood of images as something with a particle's spectrum but any phases, over that of noise alone; nats.

    Each Fourier pixel is Gaussian of variance ``noise + g ctf^2 signal``: what a smooth blob of ice, a fragment or a neighbour looks like to a
    method that knows the power of particles and not their shape. The strength g is 0 (noise alone) to 8, each as likely before the image
    is seen. The log evidence of the classes less this number says how much better an image is explained by a particle.

    Parameters
    ----------
    images, ctf
        (B, P) Fourier pixels and CTF.
    noise, signal
        (P,) variance of the noise and mean power of particles, on the scale of ``images``.
    disk
        The Fourier pixels.
    """
    weight, power, passed = disk.weight.to(noise), images.abs().square(), ctf.square() * signal
    terms = []
    for strength in _STRENGTHS:
        ratio = 1 + strength * passed / noise
        terms.append(0.5 * (weight * (power / noise * (1 - 1 / ratio) - ratio.log())).sum(1))
    return torch.logsumexp(torch.stack(terms), dim=0) - math.log(len(terms))


def separation(junk: Float[Tensor, " j"], good: Float[Tensor, " g"]) -> float:
    """Chance that a piece of junk scores above a particle (the area under the ROC curve); ties count half."""
    ordered = good.double().sort().values
    below = torch.searchsorted(ordered, junk.double(), right=False)
    above = torch.searchsorted(ordered, junk.double(), right=True)
    return float((below + above).double().mean()) / (2 * len(good))
