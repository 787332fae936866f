"""Modes far from those a particle has: images scored against a whole grid of rotations at the resolution such a grid supports."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.physics.fourier import Columns, FourierDisk
from cryorbit.poses.grid import nominate

Starts = tuple[Float[Tensor, "b c 3 3"], Float[Tensor, "b c 2"], Bool[Tensor, "b c"]]
More = tuple[Float[Tensor, "b k 3 3"], Float[Tensor, "b k 2"], Bool[Tensor, "b k"]]


@dataclass(frozen=True)
class GridSearch:
    """A map's slices on a grid of rotations.

    Attributes
    ----------
    rotations
        (H, 3, 3), one of each pair of half turns.
    slices
        (H, Q) of the map there.
    spacing
        Radian between neighbours.
    disk, keep, precision
        The Fourier pixels (Q), their columns in the images, and their multiplicity over noise variance.
    shift_sigma
        Standard deviation of the shifts in pixels.
    symmetry
        (S, 3, 3) rotations under which poses are equivalent.
    """

    rotations: Float[Tensor, "h 3 3"]
    slices: Complex[Tensor, "h q"]
    spacing: float
    disk: FourierDisk
    keep: Columns
    precision: Float[Tensor, " q"]
    shift_sigma: float
    symmetry: Float[Tensor, "s 3 3"]

    def added_to(
        self, had: Starts, images: Complex[Tensor, "b p"], ctf: Float[Tensor, "b p"], count: int, apart: float
    ) -> More:
        """The modes that particles ``had``, and the best ``count`` rotations of the grid that lie ``apart`` spacings from them and each other.

        Rotations, shifts in pixels, and which of them to use.
        """
        rotations, shifts, used = had
        turns, offsets = nominate(
            images[:, self.keep],
            ctf[:, self.keep],
            self.rotations,
            self.slices,
            self.precision,
            self.shift_sigma,
            self.disk,
            count=count,
            apart=apart * self.spacing,
        )
        mates = (turns[:, :, None] @ self.symmetry)[:, :, None]  # (b, found, 1, s, 3, 3)
        distance = so3.distance(*torch.broadcast_tensors(mates, rotations[:, None, :, None])).amin(dim=3)
        elsewhere = torch.where(used[:, None], distance, torch.inf).amin(dim=2) > apart * self.spacing
        return torch.cat([rotations, turns], 1), torch.cat([shifts, offsets], 1), torch.cat([used, elsewhere], 1)
