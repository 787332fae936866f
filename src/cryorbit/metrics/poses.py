"""Pose errors of particles whose frame has already been matched (``metrics/align.py`` does that), and their summary."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cryorbit.groups.so2 import SO2


def view_directions(rotations: Float[Tensor, "*n 3 3"]) -> Float[Tensor, "*n 3"]:
    """Unit vectors, in the molecule's frame, along which each particle is seen: the third row of A."""
    return rotations[..., 2, :]


def rotation_errors(
    estimated: Float[Tensor, "n 3 3"], true: Float[Tensor, "n 3 3"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Angle of ``estimated @ true^T`` and its two parts.

    The rotation between the poses is a swing (which tips the view direction) after a twist about the optical axis.

    Returns
    -------
    total, out_of_plane (angle between view directions), in_plane (twist): (n,) each, radian, in [0, pi].
    """
    e = estimated @ true.mT
    chord = (estimated - true).flatten(-2).norm(dim=-1) / (2 * math.sqrt(2.0))
    total = 2 * torch.asin(chord.clamp(max=1.0))
    swing = torch.atan2(torch.hypot(e[:, 0, 2], e[:, 1, 2]), e[:, 2, 2])
    twist = torch.atan2(e[:, 1, 0] - e[:, 0, 1], e[:, 0, 0] + e[:, 1, 1]).abs()
    return total, swing, twist


def in_plane_pair_errors(
    which: Int[Tensor, " n"],
    angles: Float[Tensor, " n"],
    true: Float[Tensor, "n 3 3"],
    within: float,
    group: Float[Tensor, "s 3 3"] | None = None,
) -> Float[Tensor, " pairs"]:
    """Errors of the in-plane angles of 2-D classes, which have no frame of their own: of pairs of particles.

    Pairs are of one class, and their true view directions are less than ``within`` apart, up to the molecule's symmetry: then ``A_i S A_j^T``
    is nearly a turn in the plane, and its twist is compared with the difference of the angles found. Where several elements S of the
    symmetry bring the views that near (a view along an axis), the best one counts.

    Parameters
    ----------
    which, angles
        (N,) class, and (N,) radian as in ``groups.so2``.
    true
        (N, 3, 3) rotations of the particles.
    within
        Radian.
    group
        (S, 3, 3) the molecule's symmetry; None for C1.

    Returns
    -------
    One error in [0, pi] for each pair.
    """
    elements = torch.eye(3)[None] if group is None else group
    out = []
    for k in which.unique():
        members = torch.nonzero(which == k)[:, 0]
        i, j = torch.triu_indices(len(members), len(members), 1)
        a, b = true[members[i]], true[members[j]]
        found = angles[members[i]] - angles[members[j]]
        best = torch.full((len(i),), math.inf, dtype=true.dtype)
        for element in elements.to(true):
            between = a @ element @ b.mT
            twist = torch.atan2(between[:, 1, 0] - between[:, 0, 1], between[:, 0, 0] + between[:, 1, 1])
            apart = SO2().distance(found.to(twist), twist)
            best = torch.where(between[:, 2, 2] > math.cos(within), torch.minimum(best, apart), best)
        out.append(best[best.isfinite()])
    return torch.cat(out)


def view_angles(true: Float[Tensor, "n 3 3"], group: Float[Tensor, "s 3 3"] | None = None) -> Float[Tensor, "n n"]:
    """Radian between the view directions of every two particles, the least over the molecule's symmetry; (N, N).

    Parameters
    ----------
    true
        (N, 3, 3) rotations of the particles; the view direction is the third row.
    group
        (S, 3, 3) the molecule's symmetry; None for C1.
    """
    views = view_directions(true)
    cosine = views @ views.T
    for element in [] if group is None else group.to(true):
        cosine = torch.maximum(cosine, views @ element @ views.T)
    return cosine.clamp(-1, 1).acos()


@dataclass(frozen=True)
class PoseSummary:
    """Pose errors of a set of particles in numbers a table can hold: degrees, fractions, pixels and angstrom."""

    particles: int
    median_deg: float
    mean_deg: float
    fraction_below_5_deg: float
    fraction_below_10_deg: float
    out_of_plane_median_deg: float
    in_plane_median_deg: float
    shift_median_px: float
    shift_mean_px: float
    shift_median_angst: float
    shift_mean_angst: float


def summarise(
    rotation: Float[Tensor, " n"],
    out_of_plane: Float[Tensor, " n"],
    in_plane: Float[Tensor, " n"],
    shift: Float[Tensor, " n"],
    pixel_size: float,
    keep: Bool[Tensor, " n"] | None = None,
) -> PoseSummary:
    """Summary of per-particle errors: angles in radian, ``shift`` in angstrom; every particle counts unless ``keep``
    says otherwise.
    """
    if keep is not None:
        rotation, out_of_plane, in_plane, shift = rotation[keep], out_of_plane[keep], in_plane[keep], shift[keep]
    degrees = torch.rad2deg(rotation)

    def median(x: Tensor) -> float:
        return float(torch.quantile(x.double(), 0.5)) if len(x) else math.nan

    def mean(x: Tensor) -> float:
        return float(x.double().mean())

    return PoseSummary(
        particles=len(rotation),
        median_deg=median(degrees),
        mean_deg=mean(degrees),
        fraction_below_5_deg=mean(degrees < 5.0),
        fraction_below_10_deg=mean(degrees < 10.0),
        out_of_plane_median_deg=median(torch.rad2deg(out_of_plane)),
        in_plane_median_deg=median(torch.rad2deg(in_plane)),
        shift_median_px=median(shift) / pixel_size,
        shift_mean_px=mean(shift) / pixel_size,
        shift_median_angst=median(shift),
        shift_mean_angst=mean(shift),
    )
