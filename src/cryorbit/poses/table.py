"""Continuous per-particle poses: Levenberg-Marquardt on so(3) x R^2 with the slice's exact derivatives, shift first, then both."""

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.posing import pose_losses, pose_normal_equations
from cryorbit.physics.slicing import SlicingGrid

_MAX_ROTATION = 0.25
_MAX_SHIFT_PX = 2.0
_LAST_GAIN = 0.05  # of log likelihood (a third of a standard deviation): a step expected to bring less is the last
_HOPELESS = 50.0  # damping at which no step will help


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


def _rows(which: Int[Tensor, " r"], *arrays: Tensor) -> tuple[Tensor, ...]:
    """Those rows of every array; the arrays themselves where they are all."""
    return arrays if len(which) == len(arrays[0]) else tuple(a[which] for a in arrays)


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
) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 2"], Float[Tensor, " b"], Float[Tensor, "b 5 5"]]:
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
        Most Gauss-Newton steps, of which the first ``shift_only`` move the shift alone (rotation first fails where shift first succeeds);
        a particle that stands still takes no more.
    shift_only
        See ``iterations``.
    fit_shift
        False keeps the shifts where they are.

    Returns
    -------
    Rotations, shifts, the loss (B,), never above that of the start, and the Gauss-Newton matrix (B, 5, 5) there, or a third of a standard
    deviation or less away.
    """
    best_r, best_s = rotations.clone(), shifts_px.clone()
    loss, gradient, hessian = pose_normal_equations(grid, images, ctf, precision, best_r, best_s, disk)
    damping = torch.full_like(loss, 0.05)
    free = torch.ones(5, dtype=torch.bool, device=images.device)
    free[3:] = fit_shift
    moving = torch.arange(len(images), device=images.device)
    last_r, last_s, ended = best_r.clone(), best_s.clone(), torch.zeros_like(moving, dtype=torch.bool)
    for index in range(iterations):
        first = fit_shift and index < shift_only
        stepping = free & (torch.arange(5, device=images.device) >= 3) if first else free
        step = _solve(hessian[moving], gradient[moving], damping[moving], stepping)
        slope = (gradient[moving] * stepping * step).sum(dim=1)
        gain = -slope - 0.5 * torch.einsum("bi,bij,bj->b", step, hessian[moving], step)
        step = step.to(best_r.dtype)
        trial_r = so3.exp(step[:, :3]) @ best_r[moving]
        trial_s = best_s[moving] + step[:, 3:]
        if not first:
            last = gain < _LAST_GAIN
            last_r[moving[last]], last_s[moving[last]], ended[moving[last]] = trial_r[last], trial_s[last], True
            moving, trial_r, trial_s = moving[~last], trial_r[~last], trial_s[~last]
        if not len(moving):
            break
        y, c = _rows(moving, images, ctf)
        new = pose_normal_equations(grid, y, c, precision, trial_r, trial_s, disk)
        better = new[0] < loss[moving]
        won = moving[better]
        best_r[won], best_s[won] = trial_r[better], trial_s[better]
        loss[won], gradient[won], hessian[won] = (part[better] for part in new)
        damping[moving] = torch.where(better, damping[moving] * 0.2, damping[moving] * 6.0).clamp(1e-6, 1e3)
        if not first:
            moving = moving[damping[moving] < _HOPELESS]
    # of the last steps only the loss is asked for: on so short a way the matrix hardly changes
    ended_rows = torch.nonzero(ended)[:, 0]
    y, c = _rows(ended_rows, images, ctf)
    after = pose_losses(grid, y, c, precision, last_r[ended_rows, None], last_s[ended_rows, None], disk)[:, 0]
    better = after < loss[ended_rows]
    won = ended_rows[better]
    best_r[won], best_s[won], loss[won] = last_r[won], last_s[won], after[better]
    return so3.orthonormalise(best_r), best_s, loss, hessian
