"""Point groups of particles, as rotation matrices about the axes RELION uses.

``C<n>``: n-fold along z. ``D<n>``: also 2-fold along x. ``T``: 3-fold along z, a 2-fold towards (0, sqrt 2, 1).
``O``: 4-fold along z, 3-fold along (1, 1, 1). ``I`` = ``I2``: 2-folds along x, y, z, a 5-fold in the xz plane 31.7 deg
from z; ``I1``: the same turned by 90 deg; ``I3``: 5-fold along z; ``I4``: 5-fold 63.4 deg from z towards x.
"""

import math
import re
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cryorbit.conventions import Array, rotvec_to_matrix
from cryorbit.errors import ConfigError

_GOLDEN = (1 + math.sqrt(5.0)) / 2
_TWO_FIVE = math.atan(1 / _GOLDEN)  # angle between neighbouring 2-fold and 5-fold axes of an icosahedron


_LARGEST_FOLD = 100


def _xz(angle: float) -> tuple[float, float, float]:
    return math.sin(angle), 0.0, math.cos(angle)


# Fold and axis of two rotations that generate each group.
_GENERATORS: dict[str, list[tuple[int, tuple[float, float, float]]]] = {
    "T": [(3, (0.0, 0.0, 1.0)), (2, (0.0, math.sqrt(2.0), 1.0))],
    "O": [(4, (0.0, 0.0, 1.0)), (3, (1.0, 1.0, 1.0))],
    "I1": [(2, (1.0, 0.0, 0.0)), (5, _xz(math.pi / 2 + _TWO_FIVE))],
    "I2": [(2, (0.0, 0.0, 1.0)), (5, _xz(_TWO_FIVE))],
    "I3": [(2, _xz(-_TWO_FIVE)), (5, (0.0, 0.0, 1.0))],
    "I4": [(2, _xz(_TWO_FIVE)), (5, _xz(2 * _TWO_FIVE))],
}


def _rotation(fold: int, axis: tuple[float, float, float]) -> Array:
    vector = np.asarray(axis)
    return rotvec_to_matrix(vector / np.linalg.norm(vector) * (2 * math.pi / fold))


def _closure(generators: list[Array]) -> Array:
    """Every product of the generators, the identity first."""
    members = np.eye(3)[None]
    while True:
        products = np.concatenate([members @ g for g in generators])
        gap = np.abs(products[:, None] - members[None]).max(axis=(-1, -2)).min(axis=1)
        fresh = products[gap > 1e-6]
        if not len(fresh):
            return members
        _, first = np.unique(fresh.round(6) + 0.0, axis=0, return_index=True)
        members = np.concatenate([members, fresh[np.sort(first)]])


@lru_cache(maxsize=32)
def point_group(name: str) -> Float[Tensor, "s 3 3"]:
    """Rotations of the point group ``name``, the identity first, float64.

    Parameters
    ----------
    name
        ``C1``, ``C2``, ... ``D2``, ... ``T``, ``O``, ``I`` (``I2`` in RELION too), ``I1`` to ``I4``; any case.

    Returns
    -------
    (S, 3, 3) matrices; a map of this symmetry satisfies ``v(R x) = v(x)`` for each. Cached: do not write into it.

    Raises
    ------
    ConfigError
        ``CONF112`` for a name that is none of these.

    Examples
    --------
    >>> [len(point_group(name)) for name in ("C4", "D4", "T", "O", "I")]
    [4, 8, 12, 24, 60]
    """
    key = name.strip().upper()
    key = "I2" if key == "I" else key
    cyclic = re.fullmatch(r"([CD])([1-9]\d{0,2})", key)
    if cyclic and int(cyclic[2]) > _LARGEST_FOLD:
        raise ConfigError(
            "CONF112", f"symmetry {name!r} is beyond {_LARGEST_FOLD}-fold", "the largest are C100 and D100"
        )
    if cyclic:
        generators = [_rotation(int(cyclic[2]), (0.0, 0.0, 1.0))]
        if cyclic[1] == "D":
            generators.append(_rotation(2, (1.0, 0.0, 0.0)))
    elif key in _GENERATORS:
        generators = [_rotation(fold, axis) for fold, axis in _GENERATORS[key]]
    else:
        raise ConfigError(
            "CONF112",
            f"unknown symmetry {name!r}, expected C<n>, D<n>, T, O, I, I1, I2, I3 or I4",
            "for example --symmetry C1",
        )
    return torch.from_numpy(_closure(generators))


def asymmetric_unit(rotations: Float[Tensor, "g 3 3"], group: Float[Tensor, "s 3 3"]) -> Bool[Tensor, " g"]:
    """Which of ``rotations`` to keep so that each orbit ``{R S : S in group}`` is covered once.

    On the borders between units it is covered twice. A map of this symmetry looks the same from R and from R S. Kept
    are the views (third row of R) nearest to a fixed generic direction among their symmetry mates, with every
    in-plane angle.
    """
    generic = torch.tensor([0.5377, 0.2134, 0.8157], dtype=rotations.dtype, device=rotations.device)
    views = rotations[:, 2]
    nearness = torch.einsum("gi,sij,j->gs", views, group.to(rotations), generic)
    return views @ generic >= nearness.amax(dim=1) - 1e-5


def keep_axes(
    rotation: Float[Tensor, "3 3"], shift: Float[Tensor, "3"], group: Float[Tensor, "s 3 3"]
) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3"]]:
    """The motion nearest to the one given that leaves the axes of ``group`` where they are: g G = G g, and no shift off them.

    Any motion for C1; about and along z for C<n> (or upside down); for the others one of the rotations of a larger group that
    turn this one into itself, and no shift.
    """
    if len(group) == 1:
        return rotation, shift
    if bool((group[:, 2, 2] > 0.999).all()):
        up = torch.where(rotation[2, 2] < 0, -1.0, 1.0).to(rotation)
        flip = torch.diag(torch.stack([torch.ones_like(up), up, up]))
        rest = rotation @ flip
        angle = torch.atan2(rest[1, 0] - rest[0, 1], rest[0, 0] + rest[1, 1])
        c, s, z = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
        about = torch.stack([torch.stack([c, -s, z]), torch.stack([s, c, z]), torch.stack([z, z, z + 1])])
        return about @ flip, shift * shift.new_tensor([0.0, 0.0, 1.0])
    larger = torch.cat([group, *(point_group(name).to(group) for name in (f"D{len(group)}", "O"))])
    turned = larger[:, None] @ group[None] @ larger.mT[:, None]
    gap = (turned[:, :, None] - group[None, None]).abs().amax(dim=(-1, -2)).amin(dim=2).amax(dim=1)
    allowed = larger[gap < 1e-3].to(rotation)
    best = torch.einsum("gij,ij->g", allowed, rotation).argmax()
    return allowed[best], torch.zeros_like(shift)
