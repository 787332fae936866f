"""Match two sets of poses, or two maps, over rotation, shift and hand. The only place that compares maps or poses.

A result is known only up to the frame it was found in. Everywhere here an atom at r in the moving (estimated) frame
belongs at

    ``rotation @ r + shift``   (same hand)      ``rotation @ (-r) + shift``   (``mirrored``)

in the reference (true) frame. Inverting a molecule through its centre leaves all its projections as they are when every
pose A becomes ``diag(-1, -1, 1) A`` (half a turn in the image plane): ``(K A)(-r) = (A r)`` in x and y.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.so3 import distance, half_turn, healpix_grid, orthonormalise
from cryorbit.metrics.map_search import MapAlignment, align_volumes, improve_alignment
from cryorbit.metrics.poses import PoseSummary, rotation_errors, summarise
from cryorbit.types import Poses

__all__ = [
    "MapAlignment",
    "PoseAlignment",
    "align_poses",
    "align_volumes",
    "chance_level",
    "framed",
    "improve_alignment",
    "unframed",
]

_SHARPNESS = (
    5  # the search kernel is cos(angle / 2) ** (2 * 2**5): half height at 17 degrees, for a grid that leaves at most 12
)
_COST_CAP = torch.pi / 3  # angles beyond 60 degrees count as 60 when two solutions are compared


def framed(
    rotations: Float[Tensor, "*n 3 3"],
    shifts: Float[Tensor, "*n 2"],
    rotation: Float[Tensor, "3 3"],
    shift: Float[Tensor, "3"],
    *,
    mirrored: bool = False,
) -> tuple[Float[Tensor, "*n 3 3"], Float[Tensor, "*n 2"]]:
    """Poses for a map after its motion (module docstring): the images stay as they are. ``shift`` in the unit of ``shifts``."""
    turned = (half_turn(rotations) if mirrored else rotations) @ rotation.to(rotations).mT
    return turned, shifts - (turned @ shift.to(turned))[..., :2]


def unframed(
    rotations: Float[Tensor, "*n 3 3"],
    shifts: Float[Tensor, "*n 2"],
    rotation: Float[Tensor, "3 3"],
    shift: Float[Tensor, "3"],
    *,
    mirrored: bool = False,
) -> tuple[Float[Tensor, "*n 3 3"], Float[Tensor, "*n 2"]]:
    """Inverse of :func:`framed`."""
    moved = shifts + (rotations @ shift.to(rotations))[..., :2]
    turned = rotations @ rotation.to(rotations)
    return half_turn(turned) if mirrored else turned, moved


@dataclass(frozen=True)
class PoseAlignment:
    """Estimated poses in the frame of the true ones, and what is left.

    Attributes
    ----------
    rotation, shift, mirrored
        Motion of the estimated frame onto the true one (module docstring); ``shift`` (3,) angstrom.
    poses
        Estimated poses in the true frame (for a symmetric molecule each by the equivalent nearest to the truth).
    error, out_of_plane, in_plane
        (n,) radian: the whole angle, that between view directions, and the twist about the optical axis.
    shift_error
        (n,) angstrom.
    cost, cost_other_hand
        Mean error capped at 60 degrees, radian, with this hand and with the other: close together, the hand is
        undecided.
    """

    rotation: Float[Tensor, "3 3"]
    shift: Float[Tensor, "3"]
    mirrored: bool
    poses: Poses
    error: Float[Tensor, " n"]
    out_of_plane: Float[Tensor, " n"]
    in_plane: Float[Tensor, " n"]
    shift_error: Float[Tensor, " n"]
    cost: float
    cost_other_hand: float

    def summary(self, pixel_size: float) -> PoseSummary:
        """Errors over all particles in degrees, pixels and angstrom."""
        return summarise(self.error, self.out_of_plane, self.in_plane, self.shift_error, pixel_size)


def _nearest(
    candidates: Float[Tensor, "s n 9"], rotations: Float[Tensor, "b 3 3"]
) -> tuple[Float[Tensor, "#b n 9"], Float[Tensor, "b n"]]:
    """Of each particle's equivalent candidates the one nearest to each of ``rotations``, and the angle between the two."""
    flat = rotations.flatten(1)
    if len(candidates) == 1:
        near, cosine = candidates, flat @ candidates[0].mT
    else:
        found = [(candidates @ one).max(dim=0) for one in flat]
        cosine = torch.stack([best.values for best in found])
        every = torch.arange(candidates.shape[1], device=candidates.device)
        near = torch.stack([candidates[best.indices, every] for best in found])
    return near, 2 * torch.asin((0.5 * (3.0 - cosine).clamp(min=0.0).sqrt()).clamp(max=1.0))


def _density(
    grid: Float[Tensor, "g 3 3"], candidates: Float[Tensor, "s n 9"], chunk: int = 4096
) -> Float[Tensor, " g"]:
    """How many candidates of all particles lie near each rotation of the grid."""
    flat, score = grid.reshape(-1, 9).to(torch.float32), torch.zeros(len(grid), dtype=torch.float64)
    for part in candidates.reshape(-1, 9).to(torch.float32).split(chunk):
        kernel = (flat @ part.mT).add_(1.0).div_(4.0).clamp_(min=0.0)  # cos^2(angle / 2)
        for _ in range(_SHARPNESS):
            kernel.square_()
        score += kernel.sum(dim=1)
    return score


def _modes(
    grid: Float[Tensor, "g 3 3"], score: Float[Tensor, " g"], count: int, apart: float
) -> Float[Tensor, "m 3 3"]:
    """The best ``count`` rotations of the grid that are at least ``apart`` radian from each other."""
    chosen: list[Tensor] = []
    for i in score.argsort(descending=True).tolist():
        if all(float(distance(grid[i], other)) > apart for other in chosen):
            chosen.append(grid[i])
        if len(chosen) == count:
            break
    return torch.stack(chosen)


def _robust_means(candidates: Float[Tensor, "s n 9"], starts: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b 3 3"]:
    """From each start, the median rotation of all candidates (Weiszfeld's iteration), then a mean whose weights fall off with distance.

    The second stage is iteratively reweighted least squares with Geman-McClure's function at the scale of the median
    error, which takes away what the far particles' pull left behind.
    """
    rotations = starts
    for step in range(60):
        near, angle = _nearest(candidates, rotations)
        if step < 40:
            weight = 1.0 / angle.clamp(min=1e-4)
        else:
            scale = 1.5 * angle.median(dim=1, keepdim=True).values.clamp(min=1e-6)
            weight = (1 + (angle / scale) ** 2) ** -2
        update = orthonormalise((weight[:, None] @ near).unflatten(-1, (3, 3))[:, 0])
        moved = float(distance(update, rotations).max())
        rotations = update
        if moved < 1e-8 and step >= 40:
            break
    return rotations


def _find_rotation(
    candidates: Float[Tensor, "s n 9"], symmetry: Float[Tensor, "s 3 3"]
) -> tuple[Float[Tensor, "3 3"], float]:
    """The rotation most particles agree on, and its cost."""
    grid = healpix_grid(2).to(torch.float64)
    trace = torch.einsum("sij,gij->sg", symmetry, grid)
    grid = grid[trace[0] >= trace.max(dim=0).values - 1e-4]  # one of each set of equivalent frames
    starts = _modes(grid, _density(grid, candidates), count=5, apart=0.5)
    found = _robust_means(candidates, starts)
    costs = _nearest(candidates, found)[1].clamp(max=_COST_CAP).mean(dim=1).tolist()
    best = min(range(len(found)), key=costs.__getitem__)
    return found[best], costs[best]


def _find_shift(
    rotations: Float[Tensor, "n 3 3"], difference: Float[Tensor, "n 2"], weight: Float[Tensor, " n"]
) -> Float[Tensor, "3"]:
    """Shift d of the origin from ``difference = (A d)[:2]``, least absolute deviations over all particles."""
    rows, d = rotations[:, :2, :], torch.zeros(3, dtype=rotations.dtype)
    for _ in range(30):
        residual = (difference - rows @ d).norm(dim=-1)
        w = weight / residual.clamp(min=1e-3)
        normal = torch.einsum("n,nai,naj->ij", w, rows, rows)
        right = torch.einsum("n,nai,na->i", w, rows, difference)
        d = torch.linalg.pinv(normal, rtol=1e-6, hermitian=True) @ right
    return d


def align_poses(estimated: Poses, true: Poses, symmetry: Float[Tensor, "s 3 3"] | None = None) -> PoseAlignment:
    """Match estimated to true poses by the one rotation, hand and origin that all particles together agree on best.

    Every particle proposes the rotation ``A_true^T A_estimated`` (and its mirrored kin); the densest places among *all*
    proposals are refined to robust means over all particles. Nothing is chosen by its error on a sample, which would
    flatter the result.

    Parameters
    ----------
    estimated, true
        n poses each, the same particles in the same order.
    symmetry
        (s, 3, 3) rotations of the molecule's point group in the true frame, identity first; None for C1.

    Returns
    -------
    PoseAlignment, float64.

    Raises
    ------
    DataError
        No particles, or different numbers of them.
    """
    if len(estimated) != len(true) or not len(true):
        raise DataError(
            "DATA211",
            f"{len(estimated)} estimated and {len(true)} true poses, expected the same number and at least one",
        )
    a_est, a_true = (p.rotations.detach().to("cpu", torch.float64) for p in (estimated, true))
    s_est, s_true = (p.shifts.detach().to("cpu", torch.float64) for p in (estimated, true))
    group = torch.eye(3, dtype=torch.float64)[None] if symmetry is None else symmetry.to("cpu", torch.float64)
    solutions = []
    for pose in (a_est, half_turn(a_est)):
        proposals = a_true.mT @ pose
        candidates = torch.einsum("sji,njk->snik", group, proposals).flatten(-2)
        solutions.append((pose, *_find_rotation(candidates, group)))
    mirrored = solutions[1][2] < solutions[0][2]
    pose, rotation, cost = solutions[mirrored]
    turned = pose @ rotation.mT
    closest = torch.einsum("sij,nkj,nki->sn", group, turned, a_true).argmax(dim=0)
    nearest = turned @ group.mT[closest]
    error, out_of_plane, in_plane = rotation_errors(nearest, a_true)
    shift = _find_shift(turned, s_est - s_true, 1.0 / (1.0 + (error / 0.2) ** 2))
    moved = framed(a_est, s_est, rotation, shift, mirrored=mirrored)[1]
    return PoseAlignment(
        rotation=rotation,
        shift=shift,
        mirrored=mirrored,
        poses=Poses(nearest, moved),
        error=error,
        out_of_plane=out_of_plane,
        in_plane=in_plane,
        shift_error=(moved - s_true).norm(dim=-1),
        cost=cost,
        cost_other_hand=solutions[not mirrored][2],
    )


def chance_level(
    estimated: Poses, true: Poses, generator: torch.Generator, symmetry: Float[Tensor, "s 3 3"] | None = None
) -> float:
    """Median error in radian of the same poses dealt out at random: what these view distributions give for nothing."""
    order = torch.randperm(len(estimated), generator=generator)
    return float(align_poses(estimated[order], true, symmetry).error.median())
