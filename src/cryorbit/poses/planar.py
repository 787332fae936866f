"""Continuous in-plane angle and shift of each image against the picture of its class: Levenberg-Marquardt on SO(2) x R^2."""

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.groups.so2 import SO2
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.turning import Planes, turned

_MAX_SHIFT_PX = 2.0
_TURN = 0.25  # of a radian over the radius: half of the arc over which the derivative by the angle is taken
_DAMPING = 0.05


def predicted(
    planes: Planes,
    which: Int[Tensor, " b"],
    ctf: Float[Tensor, "b p"],
    angles: Float[Tensor, " b"],
    shifts_px: Float[Tensor, "b 2"],
    disk: FourierDisk,
) -> Complex[Tensor, "b p"]:
    """Noise-free images: picture ``which`` turned, shifted, times the CTF."""
    return turned(planes, angles, disk, which) * phase_ramp(shifts_px, disk) * ctf


def refine_planar(
    planes: Planes,
    which: Int[Tensor, " b"],
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    precision: Float[Tensor, " p"],
    angles: Float[Tensor, " b"],
    shifts_px: Float[Tensor, "b 2"],
    disk: FourierDisk,
    *,
    iterations: int = 4,
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b 2"]]:
    """Minimise ``sum precision |y - ctf phase(shift) picture(angle)|^2`` over angle and shift.

    Parameters
    ----------
    planes, which
        Pictures from :func:`cryorbit.physics.turning.planes_of`, and (B,) the one each image belongs to.
    images, ctf
        (B, P) Fourier pixels and CTF.
    precision
        (P,) pixel multiplicity over noise variance.
    angles, shifts_px
        Where to start: radian, and pixels of ``disk.box``.
    disk
        The Fourier pixels.
    iterations
        Gauss-Newton steps; one that does not lower the loss is taken back and the next one is shorter.

    Returns
    -------
    Angles and shifts; the loss there is never above that of the start.
    """
    turn = _TURN / disk.radius
    k = (-2 * math.pi / disk.box) * disk.k.to(images.device)
    eye = torch.eye(3, device=images.device)

    def loss_of(angle: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        model = predicted(planes, which, ctf, angle, shift, disk)
        return model, ((images - model).abs().square() * precision).sum(1)

    model, loss = loss_of(angles, shifts_px)
    damping = torch.full_like(loss, _DAMPING)
    for _ in range(iterations):
        ramp = phase_ramp(shifts_px, disk) * ctf
        slope = (turned(planes, angles + turn, disk, which) - turned(planes, angles - turn, disk, which)) / (2 * turn)
        jacobian = torch.stack([slope * ramp, 1j * k[:, 0] * model, 1j * k[:, 1] * model], dim=1)
        weighted = jacobian.conj() * precision
        gradient = (weighted * (images - model)[:, None]).real.sum(2)
        hessian = (weighted @ jacobian.mT).real
        diagonal = hessian.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
        step = torch.linalg.solve(hessian + damping[:, None, None] * diagonal[:, None] * eye, gradient[:, :, None])[
            :, :, 0
        ]
        angle = angles + step[:, 0].clamp(-4 / disk.radius, 4 / disk.radius)
        shift = shifts_px + step[:, 1:].clamp(-_MAX_SHIFT_PX, _MAX_SHIFT_PX)
        fresh, lower = loss_of(angle, shift)
        better = lower < loss
        angles, shifts_px = torch.where(better, angle, angles), torch.where(better[:, None], shift, shifts_px)
        model, loss = torch.where(better[:, None], fresh, model), torch.where(better, lower, loss)
        damping = torch.where(better, 0.2 * damping, 6.0 * damping)
    return SO2().compose(angles, torch.zeros_like(angles)), shifts_px
