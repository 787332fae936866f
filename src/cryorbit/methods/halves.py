"""Two runs on different halves of the particles, laid on each other: in which frame and hand, and how well they agree."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.groups.point import keep_axes
from cryorbit.groups.so3 import grid_spacing
from cryorbit.methods.online_em import Grids, OnlineEM
from cryorbit.metrics.align import align_poses, framed, improve_alignment
from cryorbit.metrics.fsc import fsc, last_shell
from cryorbit.metrics.resample import move_volume
from cryorbit.types import Poses

HALVES = (1, 2)
SAME_POSE_DEG = 20.0
SURE = 0.6  # of the images with the same pose in both halves, from which on they show one structure
_SHARPER, _NEARER = 0.05, 0.03  # by which poses must become fewer, or more images be posed alike, to count as gains


def members_of(half_set: Int[Tensor, " n"], half: int) -> Int[Tensor, " m"]:
    """Which particles are in a half."""
    return torch.nonzero(half_set == half)[:, 0]


@dataclass(frozen=True)
class Agreement:
    """How two runs compare, and the motion that lays the second on the first.

    ``rotation`` (3, 3), ``shift`` (3,) pixels, ``mirrored``: see ``metrics/align.py``. ``fsc`` (shells,) after the motion; ``reach``: last
    shell before it falls below 0.5; ``pose_deg``: median angle between the poses the two give to the same images; ``posed``: share of
    images on which they agree within 20 degrees, on a coarse grid 4/3 of its spacing; ``effective``: median number of poses that images
    of the other half keep under a run, of the run that leaves more.
    """

    rotation: Float[Tensor, "3 3"]
    shift: Float[Tensor, "3"]
    mirrored: bool
    fsc: Float[Tensor, " s"]
    reach: int
    pose_deg: float
    posed: float
    effective: float

    def gains_on(self, posed: float, effective: float) -> bool:
        """Whether more images are posed alike than so many, or poses are fewer than so many and no fewer images posed alike."""
        more = self.posed - posed
        return more > _NEARER or (more > -_NEARER and self.effective < (1 - _SHARPER) * effective)

    @property
    def packed(self) -> Float[Tensor, " m"]:
        """The motion in one tensor."""
        return torch.cat([self.rotation.flatten(), self.shift, torch.tensor([float(self.mirrored)])])

    def with_motion(self, packed: Float[Tensor, " m"]) -> "Agreement":
        """The same with another motion, as :attr:`packed` wrote it."""
        return replace(self, rotation=packed[:9].view(3, 3), shift=packed[9:12], mirrored=bool(packed[12]))

    def moved(self, volume: Float[Tensor, "d d d"]) -> Float[Tensor, "d d d"]:
        """A map of the second run in the frame and hand of the first."""
        return move_volume(volume, self.rotation, self.shift, self.mirrored)

    def framed(self, poses: Poses) -> Poses:
        """Poses (shifts in pixels) of the second run in the frame and hand of the first."""
        return Poses(*framed(poses.rotations, poses.shifts, self.rotation, self.shift, mirrored=self.mirrored))


def unmoved(shells: int) -> Agreement:
    """Two runs in one frame, nothing known of how they agree."""
    return Agreement(torch.eye(3), torch.zeros(3), False, torch.ones(shells), shells - 1, 0.0, 1.0, 1.0)


def compare(
    first: tuple[OnlineEM, Grids],
    second: tuple[OnlineEM, Grids],
    chosen: tuple[Int[Tensor, " a"], Int[Tensor, " b"]],
    symmetry: Float[Tensor, "s 3 3"],
    order: int,
) -> Agreement:
    """Lay ``second`` on ``first`` by the poses both give to the particles ``chosen``, then exactly by the maps.

    Parameters
    ----------
    first, second
        Runs and the grids to search.
    chosen
        Particles of the half that ``first`` learns from, and of the half that ``second`` does.
    symmetry
        (S, 3, 3) point group of both maps.
    order
        HEALPix order at which poses count as the same or not.
    """
    (one, left_one), (two, left_two) = (run.top_poses(torch.cat(chosen), grids) for run, grids in (first, second))
    found = align_poses(two, one, symmetry.cpu().double())
    start = found.rotation.float(), found.shift.float(), found.mirrored
    rotation, shift, _ = improve_alignment(second[0].volume, first[0].volume, start)
    rotation, shift = keep_axes(rotation, shift, first[0].symmetry.cpu())
    moved = move_volume(second[0].volume, rotation, shift, found.mirrored) * second[0].mask
    radius = first[1].radius
    curve = fsc(first[0].volume.cpu(), moved.cpu()).float()[: radius + 1]
    error = torch.rad2deg(found.error)
    within = max(SAME_POSE_DEG, 4 / 3 * math.degrees(grid_spacing(order)))
    return Agreement(
        rotation,
        shift,
        found.mirrored,
        curve,
        last_shell(curve, 0.5),
        pose_deg=float(error.median()),
        posed=float((error < within).double().mean()),
        effective=max(float(left_one[len(chosen[0]) :].median()), float(left_two[: len(chosen[0])].median())),
    )
