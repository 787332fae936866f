"""Gaussian noise, white or with a radial spectrum: drawing it, measuring it, and the one Gaussian log-likelihood.

A spectrum is a (S,) tensor, one entry per shell (``|k|`` rounded): the variance per *pixel* that white noise of that
strength would have, so ``E|F(k)|^2 = D^2 spectrum[shell(k)]`` for centred, unnormalised transforms of D x D images.
White noise of variance v is v in all shells. Shells past the end of a spectrum take its last entry. Papers/001 eq. 1,
papers/002 eq. 13.
"""

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk, fourier_to_image, frequencies, friedel_weight, image_to_fourier


def shell_of_pixel(box: int) -> Int[Tensor, "d h"]:
    """Spectral shell of every pixel of a 2-D rfft of side ``box``, corners included."""
    ky, kx = frequencies(box).double(), torch.arange(box // 2 + 1, dtype=torch.float64)
    return torch.hypot(ky[:, None], kx[None]).round().to(torch.int64)


def _pick(spectrum: Float[Tensor, " s"], shell: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    return spectrum[shell.to(spectrum.device).clamp(max=len(spectrum) - 1)]


def spectrum_on_disk(spectrum: Float[Tensor, " s"], disk: FourierDisk) -> Float[Tensor, " p"]:
    """Noise variance at each pixel of ``disk``."""
    return _pick(spectrum, disk.shell)


def pixel_variance(spectrum: Float[Tensor, " s"], box: int) -> Float[Tensor, ""]:
    """Variance of a pixel of noise with ``spectrum``: its mean over all D x D frequencies (Parseval)."""
    return (_pick(spectrum, shell_of_pixel(box)) * friedel_weight(box, spectrum)).sum() / box**2


def coloured_spectrum(box: int, pixel_size: float, corner: float = 20.0, floor: float = 0.5) -> Float[Tensor, " s"]:
    """A spectrum as of ice and detector, ``floor + 1 / (1 + (corner |s|)^2)``, scaled to a pixel variance of one.

    Parameters
    ----------
    box, pixel_size
        Side in pixels; angstrom per pixel.
    corner
        Angstrom at which the low-frequency part has fallen to half.
    floor
        White part, relative to the low-frequency part at the origin.
    """
    shells = torch.arange(int(shell_of_pixel(box).max()) + 1, dtype=torch.float64)
    spectrum = floor + 1 / (1 + (corner * shells / (box * pixel_size)) ** 2)
    return (spectrum / pixel_variance(spectrum, box)).to(torch.float32)


def white_noise(count: int, box: int, variance: float, generator: torch.Generator) -> Float[Tensor, "n d d"]:
    """``count`` images of independent Gaussian pixels, float32, on the generator's device."""
    return math.sqrt(variance) * torch.randn(count, box, box, generator=generator, device=generator.device)


def radial_noise(
    count: int, box: int, spectrum: Float[Tensor, " s"], generator: torch.Generator
) -> Float[Tensor, "n d d"]:
    """``count`` images of Gaussian noise with a radial ``spectrum``, float32, on the generator's device."""
    gain = _pick(spectrum, shell_of_pixel(box)).sqrt().to(device=generator.device, dtype=torch.float32)
    return fourier_to_image(image_to_fourier(white_noise(count, box, 1.0, generator)) * gain, box)


def estimate_spectrum(residuals: Complex[Tensor, "b p"], disk: FourierDisk) -> Float[Tensor, " s"]:
    """Maximum-likelihood spectrum of noise alone: the mean of ``|F|^2 / D^2`` over images and each shell of ``disk``;
    differentiable.

    Parameters
    ----------
    residuals
        (B, P) transforms of images less the model's prediction.
    disk
        The Fourier pixels; its last shell is the last entry of the result.
    """
    power = (residuals.real**2 + residuals.imag**2).mean(0) / disk.box**2
    total, count = (disk.shell_sums(x, int(disk.shell.max()) + 1) for x in (power, torch.ones_like(power)))
    return total / count.clamp(min=1)


def log_likelihood(
    images: Complex[Tensor, "b p"],
    predicted: Complex[Tensor, "b p"],
    noise_variance: Float[Tensor, " p"] | Float[Tensor, "b p"] | Float[Tensor, ""] | float,
    disk: FourierDisk,
) -> Float[Tensor, " b"]:
    """Log-density of each image given its prediction, under Gaussian noise.

    ``-1/2 sum_p w_p (|image - predicted|^2 / (D^2 v_p) + log(2 pi v_p))``, the density of the orthonormal coordinates
    (real and imaginary parts times ``sqrt(2) / D``, the origin times ``1 / D``), hence over the whole plane that of
    the pixels themselves.

    Parameters
    ----------
    images, predicted
        (B, P) transforms on ``disk``.
    noise_variance
        Variance per pixel: one number, (P,) as :func:`spectrum_on_disk` gives it, or (B, P).
    disk
        The Fourier pixels with their weights ``w``.

    Returns
    -------
    (B,) nats; differentiable in images, predictions and variance.
    """
    residual = images - predicted
    power = residual.real**2 + residual.imag**2
    variance = torch.as_tensor(noise_variance, dtype=power.dtype, device=power.device)
    terms = power / (disk.box**2 * variance) + torch.log(2 * math.pi * variance)
    return -0.5 * (terms * disk.weight.to(power)).sum(-1)
