"""Contrast transfer function with RELION's sign and parameters (papers/001 eq. 2; RELION ``ctf.cpp``'s formula).

``gamma(k) = -pi lambda s^T A s + pi/2 Cs lambda^3 |s|^4 - phase - atan(Q0 / sqrt(1 - Q0^2))`` with the defocus matrix A of
(DefocusU, DefocusV, angle), and ``CTF = -sin(gamma) exp(-B |s|^2 / 4) scale``: positive at low frequency for underfocus, ``CTF(0) = Q0``.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk
from cryorbit.types import CTFParams

_VOLT_PER_KV = 1e3
_ANGSTROM_PER_MM = 1e7


def wavelength(voltage: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Relativistic electron wavelength in angstrom at ``voltage`` kV: ``12.2643247 / sqrt(V (1 + 0.978466e-6 V))``, V in volt."""
    v = voltage * _VOLT_PER_KV
    return 12.2643247 / torch.sqrt(v * (1 + v * 0.978466e-6))


def ctf(params: CTFParams, frequencies: Float[Tensor, "p 2"]) -> Float[Tensor, "n p"]:
    """CTF of N particles at P spatial frequencies, ``-gain sin(gamma)`` of :func:`ctf_phase`.

    Parameters
    ----------
    params
        N particles' parameters.
    frequencies
        (P, 2) spatial frequencies (x, y) in 1 / angstrom.

    Returns
    -------
    (N, P), differentiable in every parameter; finite gradients at zero astigmatism and for DefocusU < DefocusV.
    """
    gamma, gain = ctf_phase(params, frequencies)
    return -torch.sin(gamma) * gain


def ctf_phase(
    params: CTFParams, frequencies: Float[Tensor, "p 2"]
) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n p"]]:
    """Phase ``gamma`` and amplitude (B-factor and scale) of the CTF, (N, P) each; arguments as for :func:`ctf`."""
    sx, sy = frequencies[:, 0], frequencies[:, 1]
    s2 = (sx**2 + sy**2)[None]
    column = {name: getattr(params, name)[:, None] for name in params.__dataclass_fields__}
    lam = wavelength(column["voltage"])
    mean = 0.5 * (column["defocus_u"] + column["defocus_v"])
    half = 0.5 * (column["defocus_u"] - column["defocus_v"])
    angle = column["defocus_angle"]
    defocus_s2 = mean * s2 + half * (torch.cos(2 * angle) * (sx**2 - sy**2) + torch.sin(2 * angle) * (2 * sx * sy))
    cs = column["spherical_aberration"] * _ANGSTROM_PER_MM
    gamma = (
        -math.pi * lam * defocus_s2
        + 0.5 * math.pi * cs * lam**3 * s2**2
        - column["phase_shift"]
        - torch.asin(column["amplitude_contrast"])
    )
    return gamma, torch.exp(-0.25 * column["bfactor"] * s2) * column["scale"]


def frequencies_of(disk: FourierDisk, pixel_size: float, like: Tensor) -> Float[Tensor, "p 2"]:
    """Spatial frequencies (x, y) in 1 / angstrom of the Fourier pixels of ``disk`` for images of ``pixel_size`` angstrom."""
    return disk.k.to(like) / (disk.box * pixel_size)


def ctf_on_disk(params: CTFParams, disk: FourierDisk, pixel_size: float) -> Float[Tensor, "n p"]:
    """CTF at the Fourier pixels of ``disk`` for images of ``pixel_size`` angstrom."""
    return ctf(params, frequencies_of(disk, pixel_size, params.defocus_u))
