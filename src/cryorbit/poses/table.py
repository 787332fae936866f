"""Continuous per-particle poses: Levenberg-Marquardt on so(3) x R^2 with the slice's exact derivatives, shift first, then both."""

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import SlicingGrid, pose_normal_equations

_MAX_ROTATION = 0.25
_MAX_SHIFT_PX = 2.0


def _solve(
    hessian: Float[Tensor, "b 5 5"],
    gradient: Float[Tensor, "b 5"],
    damping: Float[Tensor, " b"],
    free: Bool[Tensor, " 5"],
) -> Float[Tensor, "b 5"]:
    """Damped Gauss-Newton step in the ``free`` coordinates, clipped to a trust region."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    frozen = (~free).to(hessian.dtype)
    scale = diagonal.clamp_min(1e-12 * float(diagonal.max()) + 1e-30)
    system = hessian * torch.outer(free, free).to(hessian.dtype) + torch.diag_embed(damping[:, None] * scale + frozen)
    step = torch.linalg.solve(system, -(gradient * free)[:, :, None])[:, :, 0]
    rotation, shift = step[:, :3], step[:, 3:]
    rotation = rotation * (_MAX_ROTATION / rotation.norm(dim=1, keepdim=True).clamp_min(_MAX_ROTATION))
    shift = shift * (_MAX_SHIFT_PX / shift.norm(dim=1, keepdim=True).clamp_min(_MAX_SHIFT_PX))
    return torch.cat([rotation, shift], dim=1)


def refine_poses(
    grid: SlicingGrid,
    images: Complex[Tensor, "b p"],
    ctf: Float[Tensor, "b p"],
    precision: Float[Tensor, " p"],
    rotations: Float[Tensor, "b 3 3"],
    shifts_px: Float[Tensor, "b 2"],
    disk: FourierDisk,
    *,
    iterations: int = 6,
    shift_only: int = 1,
    fit_shift: bool = True,
) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"], Float[Tensor, " b"]]:
    """Minimise ``sum precision |y - ctf phase(shift) slice(rotation)|^2 / 2`` over each particle's pose.

    Parameters
    ----------
    grid
        Current map.
    images, ctf
        (B, P) Fourier pixels and CTF.
    precision
        (P,) pixel multiplicity over noise variance.
    rotations, shifts_px
        Where to start; shifts in pixels of ``disk.box``.
    disk
        The Fourier pixels.
    iterations
        Gauss-Newton steps, of which the first ``shift_only`` move the shift alone (rotation first fails where shift first succeeds).
    shift_only
        See ``iterations``.
    fit_shift
        False keeps the shifts where they are.

    Returns
    -------
    Rotations, shifts and the loss (B,) there; never worse than the start.
    """
    damping = torch.full((len(images),), 0.2, dtype=torch.float32, device=images.device)
    best_r, best_s = rotations, shifts_px
    loss, gradient, hessian = pose_normal_equations(grid, images, ctf, precision, best_r, best_s, disk)
    for index in range(iterations):
        free = torch.ones(5, dtype=torch.bool, device=images.device)
        if fit_shift and index < shift_only:
            free[:3] = False
        if not fit_shift:
            free[3:] = False
        step = _solve(hessian, gradient, damping.to(hessian.dtype), free).to(best_r.dtype)
        trial_r = so3.exp(step[:, :3]) @ best_r
        trial_s = best_s + step[:, 3:]
        new_loss, new_gradient, new_hessian = pose_normal_equations(
            grid, images, ctf, precision, trial_r, trial_s, disk
        )
        better = new_loss < loss
        best_r = torch.where(better[:, None, None], trial_r, best_r)
        best_s = torch.where(better[:, None], trial_s, best_s)
        loss = torch.where(better, new_loss, loss)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        hessian = torch.where(better[:, None, None], new_hessian, hessian)
        damping = torch.where(better, damping * 0.2, damping * 6.0).clamp(1e-6, 1e3)
    return so3.orthonormalise(best_r), best_s, loss
