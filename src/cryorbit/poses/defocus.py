"""Each particle's defocus at a given pose, searched over a range in one pass over its Fourier pixels.

A change ``d`` of the defocus turns the CTF's phase by ``-pi lambda |s|^2 d`` at every pixel, whatever the astigmatism. With
``CTF = -gain sin(gamma - theta)``, ``theta = pi lambda |s|^2 d``, the log likelihood of image y and prediction m (without CTF) is

``S(d) = -Im sum_u A_u exp(-i theta_u) + 1/4 Re sum_u B_u exp(-2 i theta_u) + const``,
``A_u = sum precision gain Re(y m*) exp(i gamma)``, ``B_u = sum precision gain^2 |m|^2 exp(2 i gamma)``

over the pixels of each distinct ``u = |k|^2``: a short Fourier sum, evaluated at all d by one matrix product. The same search is CTF
refinement's (Zivanov et al. 2018, eLife 7:e42166); the prior on d is a normal distribution whose width is learned from all particles.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk

_STEP = 0.15  # radian that the phase at the rim turns between offsets
_FEWEST = 9


@dataclass(frozen=True)
class Defocus:
    """What is known of each particle's defocus: most probable offset, mean and standard deviation (B,), angstrom."""

    best: Float[Tensor, " b"]
    mean: Float[Tensor, " b"]
    sd: Float[Tensor, " b"]


def defocus_posterior(
    images: Complex[Tensor, "b p"],
    predicted: Complex[Tensor, "b p"],
    gamma: Float[Tensor, "b p"],
    gain: Float[Tensor, "b p"],
    precision: Float[Tensor, " p"],
    rate: Float[Tensor, " b"],
    disk: FourierDisk,
    *,
    reach: float,
    sigma: float,
) -> Defocus:
    """Posterior of an offset to each particle's defocus.

    Parameters
    ----------
    images, predicted
        (B, P) Fourier pixels, and the model's at the particles' poses without CTF.
    gamma, gain
        (B, P) phase and amplitude of the CTF at offset 0: ``-gain sin(gamma)``.
    precision
        (P,) pixel multiplicity over noise variance.
    rate
        (B,) ``pi lambda`` over the square of a Fourier pixel's width: radian per angstrom of defocus and ``|k|^2`` in Fourier pixels.
    disk
        The Fourier pixels.
    reach
        Largest offset looked at, angstrom.
    sigma
        Standard deviation of the prior, angstrom.
    """
    square, column = torch.unique(disk.kx.square() + disk.ky.square(), return_inverse=True)
    steps = int(2 * reach * float(rate.max()) * float(square[-1]) / _STEP)
    offsets = torch.linspace(-reach, reach, max(steps, _FEWEST) | 1, dtype=gamma.dtype, device=gamma.device)

    def summed(values: Float[Tensor, "b p"], phase: Float[Tensor, "b p"]) -> Complex[Tensor, "b u"]:
        terms = torch.polar(values, phase)
        return terms.new_zeros(len(terms), len(square)).index_add(1, column, terms)

    linear = summed(precision * gain * (images * predicted.conj()).real, gamma)
    quadratic = summed(precision * gain.square() * predicted.abs().square(), 2 * gamma)
    score = torch.empty(len(images), len(offsets), dtype=gamma.dtype, device=gamma.device)
    for each in rate.unique():  # one for each voltage
        theta = each * square[:, None] * offsets
        own = rate == each
        turn = torch.polar(torch.ones_like(theta), -theta)
        score[own] = (0.25 * (quadratic[own] @ turn.square()).real) - (linear[own] @ turn).imag
    score = score - 0.5 * (offsets / sigma).square()
    weight = score.softmax(dim=1)
    mean = weight @ offsets
    sd = (weight @ offsets.square() - mean.square()).clamp_min((offsets[1] - offsets[0]) ** 2 / 12).sqrt()
    return Defocus(_peak(score, offsets), mean, sd)


def _peak(score: Float[Tensor, "b k"], offsets: Float[Tensor, " k"]) -> Float[Tensor, " b"]:
    """Where the parabola through the best offset and its neighbours is highest."""
    best = score.argmax(dim=1)
    at = best.clamp(1, len(offsets) - 2)
    low, mid, high = (score.gather(1, (at + i)[:, None])[:, 0] for i in (-1, 0, 1))
    bend = (low - 2 * mid + high).clamp(max=-1e-20)
    between = (0.5 * (low - high) / bend).clamp(-1, 1)
    inner = offsets[at] + between * (offsets[1] - offsets[0])
    return torch.where(best == at, inner, offsets[best])
