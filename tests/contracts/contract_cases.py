"""One small case for every orbit model and every volume that the registries name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryorbit.conventions import euler_to_matrix
from cryorbit.groups.cyclic import Cyclic
from cryorbit.physics.cryoem import CryoEM
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.mra import MRA
from cryorbit.physics.planar import Planar
from cryorbit.physics.slicing import slice_grid, slicing_grid


@dataclass(frozen=True)
class OrbitCase:
    """What the contract needs of a model: a signal held in one tensor, exact group actions, generic elements.

    ``signal(array)`` turns the tensor into what ``observe`` takes; ``act(h, array)`` is ``h . v`` for the lattice
    elements ``exact``, written with index arithmetic and not with the model; ``smooth`` says that elements are real
    numbers one may differentiate by.
    """

    model: Any
    array: Tensor
    signal: Callable[[Tensor], Any]
    exact: Tensor
    act: Callable[[Tensor, Tensor], Tensor]
    generic: Tensor
    smooth: bool


def _blob_2d(d: int) -> Tensor:
    """A smooth image without symmetry that is zero at the border."""
    axis = torch.arange(d, dtype=torch.float64) - d // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    first = torch.exp(-((x - 1.2) ** 2 + (y + 0.7) ** 2) / 3)
    return (first + 0.6 * torch.exp(-((x + 1.5) ** 2 + (y - 1.0) ** 2) / 2)) * (x**2 + y**2 < (d / 2 - 1) ** 2)


def blob_3d(d: int) -> Tensor:
    """A smooth map without symmetry, zero outside a ball that every rotation keeps inside the box; zyx."""
    axis = torch.arange(d, dtype=torch.float64) - d // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    first = torch.exp(-((x - 1.2) ** 2 + (y + 0.7) ** 2 + (z - 0.4) ** 2) / 3)
    second = 0.6 * torch.exp(-((x + 1.5) ** 2 + (y - 1.0) ** 2 + (z + 1.1) ** 2) / 2)
    return (first + second) * (x**2 + y**2 + z**2 < (d / 2 - 1) ** 2)


def quarter_turns() -> Tensor:
    """Six of the rotations that map a lattice onto itself, about x, y, z and mixed."""
    angles = np.array([[0, 0, 0], [90, 0, 0], [0, 90, 0], [90, 90, 0], [0, 90, 90], [90, 180, 0]], dtype=float)
    return torch.from_numpy(euler_to_matrix(angles)).round()


def rotate_map(rotation: Tensor, volume: Tensor) -> Tensor:
    """``(R . v)(x) = v(R^T x)`` for a lattice rotation, by looking up each voxel."""
    d = volume.shape[-1]
    axis = torch.arange(d) - d // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    source = torch.stack([x, y, z], dim=-1) @ rotation.to(torch.int64) + d // 2  # rows: x^T R = (R^T x)^T
    inside = ((source >= 0) & (source < d)).all(dim=-1)
    source = source.clamp(0, d - 1)
    return torch.where(inside, volume[source[..., 2], source[..., 1], source[..., 0]], 0.0)


def _rotate_image(angle: Tensor, image: Tensor) -> Tensor:
    turns = round(float(angle) / (np.pi / 2)) % 4
    d = image.shape[-1]
    axis = torch.arange(d) - d // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    c, s = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]
    back_x, back_y = c * x + s * y + d // 2, -s * x + c * y + d // 2
    inside = (back_x >= 0) & (back_x < d) & (back_y >= 0) & (back_y < d)
    return torch.where(inside, image[back_y.clamp(0, d - 1), back_x.clamp(0, d - 1)], 0.0)


def _mra(odd: bool, generator: torch.Generator) -> OrbitCase:
    n = 7 if odd else 8
    array = torch.randn(n, generator=generator, dtype=torch.float64)

    def act(h: Tensor, v: Tensor) -> Tensor:
        return torch.roll(v, int(h))

    return OrbitCase(MRA(Cyclic(n)), array, lambda v: v, torch.arange(n), act, torch.tensor([1, 5, 2]), False)


def _planar(odd: bool, generator: torch.Generator) -> OrbitCase:
    exact = torch.arange(-1, 3, dtype=torch.float64) * (torch.pi / 2)
    generic = torch.tensor([0.3, -1.1, 2.5], dtype=torch.float64)
    return OrbitCase(Planar(), _blob_2d(11 if odd else 12), lambda v: v, exact, _rotate_image, generic, True)


def _cryoem(odd: bool, generator: torch.Generator) -> OrbitCase:
    d = 11 if odd else 12
    disk = fourier_disk(d)

    def signal(v: Tensor) -> Callable[..., Tensor]:
        return lambda rotations, pixels: slice_grid(slicing_grid(v, pixels.radius, 2), rotations, pixels)

    generic = torch.from_numpy(euler_to_matrix(np.array([[31.0, 47.0, 58.0], [-100.0, 121.0, 13.0]])))
    return OrbitCase(CryoEM(disk), blob_3d(d), signal, quarter_turns(), rotate_map, generic, True)


CASES: dict[str, Callable[[bool, torch.Generator], OrbitCase]] = {"mra": _mra, "planar": _planar, "cryoem": _cryoem}
