"""What the maps' own errors add to the posteriors of poses that were found with them."""

from collections.abc import Iterable

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.posing import pose_normal_equations
from cryorbit.physics.slicing import SlicingGrid
from cryorbit.poses.table import refine_poses

_FARTHEST = 5.0  # times the expected square: offsets beyond that are of other modes, and count as this
_LEAST_FSC = 0.05
_STEPS = 4  # from the pose under one map to that under the other

Judged = tuple[SlicingGrid, Int[Tensor, " b"], Complex[Tensor, "b p"], Float[Tensor, "b p"]]


def map_error(
    offset: Float[Tensor, "b 5"],
    hessian: Float[Tensor, "b 5 5"],
    sharper: Float[Tensor, "b 5 5"],
    *,
    fit_shift: bool = True,
) -> float:
    """Factor by which errors of the map widen the posteriors of poses that were found with it.

    A particle's poses under two maps of independent errors have one part in common, what its image's noise would do to a pose under the
    *true* map, and differ in the rest. The common part has the covariance ``H_0^-1``, H_0 the Gauss-Newton matrix under the true map; a
    map attenuated by its Wiener weight has ``H = FSC H_0``, shell by shell and on average. Half the scatter of the ``offset`` between the
    two poses is the rest: what the map's noise makes of the image's, and where the map itself is warped. In the metric of H the sum is
    ``tr(H H_0^-1) / 5 + <offset H offset> / 10``. It is never below 1, the noise of the image under the map at hand: it falls
    below where the two maps are not independent (poses of one joint refinement), and regions are then too small.

    Parameters
    ----------
    offset
        (B, 5) between the poses of a particle under the maps of the two halves.
    hessian
        (B, 5, 5) under one of them.
    sharper
        (B, 5, 5) the same with the precision over the FSC.
    fit_shift
        Whether the last two parameters are free.
    """
    free = 5 if fit_shift else 3
    hessian, sharper = hessian[:, :free, :free], sharper[:, :free, :free]
    kept = torch.linalg.solve(sharper, hessian).diagonal(dim1=1, dim2=2).mean(dim=1)
    scatter = torch.einsum("bi,bij,bj->b", offset[:, :free], hessian, offset[:, :free]) / free
    return max(1.0, float(kept.median() + 0.5 * scatter.clamp(max=_FARTHEST).mean()))


def map_widening(
    judged: Iterable[Judged],
    poses: tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"]],
    precision: Float[Tensor, " p"],
    correlation: Float[Tensor, " p"],
    disk: FourierDisk,
    *,
    fit_shift: bool = True,
) -> float:
    """:func:`map_error` of two half maps: the poses of some particles of each half are moved to where the map of the other has them.

    Parameters
    ----------
    judged
        Batches of particles: the map of the other half, who they are, their images and CTF times intensity on the disk.
    poses
        Of all particles under their own half's map: (N, 3, 3), (N, 2) pixels.
    precision, correlation
        (P,) weight over noise variance, and FSC of the halves, at the disk's pixels.
    disk
        Fourier pixels of the columns.
    fit_shift
        Whether shifts were fitted.
    """
    parts = []
    sharp = precision / correlation.clamp(_LEAST_FSC, 1)
    for grid, batch, image, ctf in judged:
        r, s = (x[batch].to(precision.device) for x in poses)
        moved_r, moved_s, _, hessian = refine_poses(
            grid, image, ctf, precision, r, s, disk, iterations=_STEPS, shift_only=0, fit_shift=fit_shift
        )
        sharper = pose_normal_equations(grid, image, ctf, sharp, moved_r, moved_s, disk)[2]
        offset = torch.cat([so3.log(moved_r @ r.mT), moved_s - s], dim=1)
        parts.append((offset.double(), hessian, sharper))
    return map_error(*(torch.cat(x).cpu() for x in zip(*parts, strict=True)), fit_shift=fit_shift)
