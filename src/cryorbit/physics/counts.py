"""Electron counts: the rate of a pixel, its Poisson log-likelihood and its information (papers/002 appendix D names the model and no more).

A pixel that no particle covers receives ``dose`` electrons on average. A clean image adds ``excess`` to it, CTF applied and shifted, in
electrons; over the dose it is the contrast. Physics says ``rate = dose + excess``, and :mod:`cryorbit.simulate` makes images so, refusing an
excess that leaves no rate. A fit cannot refuse: draws of a map that is hardly known, and steps towards it, go below zero, where no count has a
likelihood. Its rate is

    ``rate = dose * softplus(1 + excess / dose)``,    ``softplus(u) = log(1 + exp(10 u)) / 10``,

positive for every map, without a bound to hit or a gradient that vanishes. It is above ``dose + excess`` by 5e-6 of the dose where there is no
excess, 7e-4 where half the dose is left, 0.07 where none is. As ``log softplus`` is concave and ``softplus`` convex, the log-likelihood stays
concave in the excess, so in the map, as it is for the linear rate: there is one optimum. Clamping has no gradient where it is needed; an
exponential is another physics at strong contrast; the transform of Anscombe (1948, Biometrika 35, 246) makes counts Gaussian above about four
a pixel, and not below, which is where it matters.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from cryorbit.errors import DataError

SHARPNESS = 10.0
"""Of the softplus, per unit of contrast: the larger, the nearer to ``dose + excess`` and the sharper its bend at zero."""

_TAIL = -15.0  # argument below which log(log(1 + exp(t))) is t, in float32


def check_counts(images: Float[Tensor, "b d d"], first: int = 0) -> None:
    """Refuse images that are not counts.

    Parameters
    ----------
    images
        What a detector gave.
    first
        Index of the first image, for the message.

    Raises
    ------
    DataError
        DATA120 a pixel that is negative, fractional or not finite.
    """
    bad: Bool[Tensor, "b d d"] = ~torch.isfinite(images) | (images < 0) | (images != images.round())
    if bool(bad.any()):
        image = int(torch.nonzero(bad)[0, 0])
        value = float(images[image][bad[image]][0])
        raise DataError(
            "DATA120",
            f"image {first + image + 1} has a pixel of {value:g}, expected counts: 0, 1, 2, ...",
            "a Poisson likelihood is for raw counts, before normalisation, gain, interpolation or inversion; "
            'for images as RELION and cryoSPARC extract them use likelihood = "gaussian"',
        )


def check_dose(dose: float) -> None:
    """Refuse a dose, in electrons per pixel, that leaves no rate.

    Raises
    ------
    DataError
        DATA121 it is not positive, or not finite.
    """
    if not (math.isfinite(dose) and dose > 0):
        raise DataError(
            "DATA121",
            f"a dose of {dose:g} electrons per pixel, expected more than 0",
            "the pixels around the particles hold no counts: are the images masked, or background-subtracted?",
        )


def _scaled(excess: Float[Tensor, "*b"], dose: float) -> Float[Tensor, "*b"]:
    """``SHARPNESS (1 + excess / dose)``."""
    check_dose(dose)
    return SHARPNESS * (1 + excess / dose)


def _log_softplus(t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """``log(log(1 + exp(t)))``, also where ``exp(t)`` is no float."""
    return torch.where(t > _TAIL, softplus(t.clamp_min(_TAIL)).log(), t)


def electron_rate(excess: Float[Tensor, "*b"], dose: float) -> Float[Tensor, "*b"]:
    """Expected electrons of each pixel; differentiable.

    Parameters
    ----------
    excess
        Clean image in electrons.
    dose
        Electrons of a pixel without a particle.

    Raises
    ------
    DataError
        DATA121 the dose is not positive.
    """
    return dose / SHARPNESS * softplus(_scaled(excess, dose))


def count_log_likelihood(counts: Float[Tensor, "*b"], excess: Float[Tensor, "*b"], dose: float) -> Float[Tensor, "*b"]:
    """Log-probability of each pixel's counts, ``n log rate - rate - log n!`` in nats; differentiable in ``excess`` and concave in it.

    In float64 whatever comes in: the terms are each of the order of n log n and nearly cancel.

    Parameters
    ----------
    counts
        Whole numbers, zero or more (:func:`check_counts`).
    excess, dose
        As for :func:`electron_rate`.

    Raises
    ------
    DataError
        DATA121 the dose is not positive.
    """
    n, rate = counts.double(), electron_rate(excess.double(), dose)
    log_rate = math.log(dose / SHARPNESS) + _log_softplus(_scaled(excess.double(), dose))
    return n * log_rate - rate - torch.lgamma(n + 1)


def count_information(excess: Float[Tensor, "*b"], dose: float) -> Float[Tensor, "*b"]:
    """Fisher information of each pixel about its excess, ``(d rate / d excess)^2 / rate``: about one over the rate, 0 far below zero.

    Counts of an image are independent, so in its Fourier pixels the information is a matrix whose diagonal is the mean over pixels: that of
    white noise of the variance ``1 / mean``.

    Parameters
    ----------
    excess, dose
        As for :func:`electron_rate`.

    Raises
    ------
    DataError
        DATA121 the dose is not positive.
    """
    t = _scaled(excess, dose)
    return SHARPNESS / dose * (2 * logsigmoid(t) - _log_softplus(t)).exp()
