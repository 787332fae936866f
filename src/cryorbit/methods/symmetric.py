"""The point group an ab initio map shows, and what follows from it for maps and poses."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.groups.point import point_group
from cryorbit.methods.halves import SURE, Agreement
from cryorbit.metrics.masks import contrast_sign
from cryorbit.metrics.resample import move_volume
from cryorbit.metrics.symmetry import SymmetryFinding, detect_symmetry, no_symmetry
from cryorbit.types import Volume

_SMALLEST_BOX = 16  # in which a symmetry is looked for
_CLEAR = 2.0  # standard errors of a change of the held-out likelihood
_FEWER = 0.75  # of the images posed alike up to a symmetry are posed alike without it, at most, where it is true


@dataclass(frozen=True)
class SymmetryTest:
    """What held-out images say of a symmetry: ``gain`` of their mean log likelihood when each half's map is averaged over it, its standard
    ``error``, how the halves agree when equivalent poses are one (``agreement``), and whether it is ``allowed``.
    """

    found: SymmetryFinding
    gain: float
    error: float
    agreement: Agreement
    allowed: bool


def find_symmetry(
    maps: tuple[Float[Tensor, "d d d"], Float[Tensor, "d d d"]],
    fsc: Float[Tensor, " shells"],
    mask_diameter: float,
    pixel_size: float,
) -> SymmetryFinding:
    """Point group of the mean of two half maps in one frame, of either contrast; C1 where there is nothing to look at.

    Parameters
    ----------
    maps
        Two (D, D, D) maps.
    fsc
        Of the two, as far as it was computed.
    mask_diameter, pixel_size
        Angstrom.
    """
    mean = (0.5 * (maps[0] + maps[1])).cpu()
    box = mean.shape[-1]
    if box < _SMALLEST_BOX:
        return no_symmetry()
    mean = mean * contrast_sign(mean, mask_diameter, pixel_size)
    shells = torch.zeros(box // 2 + 1)
    shells[: len(fsc)] = fsc
    try:
        return detect_symmetry(Volume(mean, pixel_size), mask_diameter=mask_diameter, fsc=shells)
    except DataError:  # no density to look at: a map of noise
        return no_symmetry()


def tested(found: SymmetryFinding, gain: Float[Tensor, " b"], plain: Agreement, agreement: Agreement) -> SymmetryTest:
    """Whether a symmetry is allowed: held-out images must be likelier for it (``gain``, of each), or as likely while the halves pose images
    alike when equivalent poses are one (``agreement``), and clearly fewer of them otherwise (``plain``)."""
    mean, error = float(gain.mean()), float(gain.std()) / len(gain) ** 0.5
    alike = agreement.posed >= SURE and plain.posed <= _FEWER * agreement.posed
    return SymmetryTest(found, mean, error, agreement, mean > (-_CLEAR if alike else _CLEAR) * error)


def group_of(found: SymmetryFinding) -> Float[Tensor, "s 3 3"]:
    """The rotations that leave the map as it is, in the map's own frame."""
    return found.rotation.T @ point_group(found.name).float() @ found.rotation


def averaged(volume: Float[Tensor, "d d d"], group: Float[Tensor, "s 3 3"]) -> Float[Tensor, "d d d"]:
    """The map averaged over the rotations ``group`` about its centre."""
    if len(group) == 1:
        return volume
    return torch.stack([move_volume(volume, g, torch.zeros(3)) for g in group]).mean(dim=0).to(volume)


def symmetrised(
    volume: Float[Tensor, "d d d"], found: SymmetryFinding, pixel_size: float, *, framed: bool = False
) -> Float[Tensor, "d d d"]:
    """The map averaged over its point group.

    In its own frame, r -> R^T (g (R r + t) - t) for each g, or ``framed`` with the axes where ``groups/point.py`` has them, r -> g (R r + t).
    """
    turn, shift = found.rotation, found.shift / pixel_size
    back, origin = (torch.eye(3), torch.zeros(3)) if framed else (turn.T, shift)
    group = point_group(found.name).float()
    moved = [move_volume(volume, back @ g @ turn, back @ (g @ shift - origin)) for g in group]
    return torch.stack(moved).mean(dim=0).to(volume)
