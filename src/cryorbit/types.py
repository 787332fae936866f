"""The values that cross module borders: frozen, checked when they are made.

Units, unmarked: angstrom, radian, kV, mm. Rotations act on ``xyz`` columns (see ``conventions``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryorbit.errors import DataError


def _require(ok: bool, code: str, message: str, hint: str = "") -> None:
    if not ok:
        raise DataError(code, message, hint)


@dataclass(frozen=True)
class Poses:
    """Where each particle is: ``rotations`` (N, 3, 3), RELION's matrix A of (rot, tilt, psi); ``shifts`` (N, 2), (x, y) in angstrom.

    ``image(x) = P(x - shift)``: a positive shift moves the particle towards larger x and y in the image.
    """

    rotations: Float[Tensor, "n 3 3"]
    shifts: Float[Tensor, "n 2"]

    def __post_init__(self) -> None:
        r, s = self.rotations, self.shifts
        _require(
            r.ndim == 3 and r.shape[1:] == (3, 3),
            "DATA001",
            f"rotations have shape {tuple(r.shape)}, expected (n, 3, 3)",
        )
        _require(
            s.shape == (r.shape[0], 2), "DATA002", f"shifts have shape {tuple(s.shape)}, expected ({r.shape[0]}, 2)"
        )
        if r.shape[0]:
            eye = torch.eye(3, dtype=r.dtype, device=r.device)
            off = float((r.detach() @ r.detach().mT - eye).abs().max())
            _require(
                off < 1e-3,
                "DATA003",
                f"a rotation matrix is off orthogonality by {off:.2g}",
                "re-orthonormalise the matrices",
            )
            _require(
                bool((torch.linalg.det(r.detach()) > 0).all()),
                "DATA004",
                "a rotation matrix has determinant -1 (a mirror)",
            )

    def __len__(self) -> int:
        return self.rotations.shape[0]

    def __getitem__(self, index: "slice | Int[Tensor, ' m'] | Bool[Tensor, ' n']") -> "Poses":
        return Poses(self.rotations[index], self.shifts[index])

    def to(self, device: torch.device | str) -> "Poses":
        """The same poses on another device."""
        return Poses(self.rotations.to(device), self.shifts.to(device))


@dataclass(frozen=True)
class CTFParams:
    """Contrast transfer of each particle, one entry per particle in every field.

    ``defocus_u``, ``defocus_v`` angstrom (positive = underfocus); ``defocus_angle`` radian, from the x axis to U;
    ``phase_shift`` radian; ``voltage`` kV; ``spherical_aberration`` mm; ``amplitude_contrast`` fraction; ``bfactor`` A^2; ``scale``.
    """

    defocus_u: Float[Tensor, " n"]
    defocus_v: Float[Tensor, " n"]
    defocus_angle: Float[Tensor, " n"]
    phase_shift: Float[Tensor, " n"]
    voltage: Float[Tensor, " n"]
    spherical_aberration: Float[Tensor, " n"]
    amplitude_contrast: Float[Tensor, " n"]
    bfactor: Float[Tensor, " n"]
    scale: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        n = self.defocus_u.shape
        for f in fields(self):
            value = getattr(self, f.name)
            _require(
                value.shape == n and value.ndim == 1,
                "DATA005",
                f"CTF field {f.name} has shape {tuple(value.shape)}, expected {tuple(n)}",
            )

    @staticmethod
    def of(columns: Mapping[str, NDArray[np.float64]], dtype: torch.dtype = torch.float64) -> "CTFParams":
        """Parameters from (N,) arrays by the names of the fields."""
        return CTFParams(**{name: torch.as_tensor(values, dtype=dtype) for name, values in columns.items()})

    def __len__(self) -> int:
        return self.defocus_u.shape[0]

    def __getitem__(self, index: "slice | Int[Tensor, ' m'] | Bool[Tensor, ' n']") -> "CTFParams":
        return CTFParams(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> "CTFParams":
        """The same parameters on another device."""
        return CTFParams(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class Volume:
    """A map on a cubic grid: ``data`` (D, D, D) in zyx order, centre at index D // 2; ``pixel_size`` angstrom."""

    data: Float[Tensor, "d d d"]
    pixel_size: float

    def __post_init__(self) -> None:
        s = self.data.shape
        _require(len(s) == 3 and s[0] == s[1] == s[2], "DATA006", f"a map must be a cube, found {tuple(s)}")
        _require(self.pixel_size > 0, "DATA007", f"pixel size must be positive, found {self.pixel_size}")

    @property
    def box(self) -> int:
        """Side length D in pixels."""
        return self.data.shape[-1]


@dataclass(frozen=True)
class Reconstruction:
    """What a method hands back: the map, its independent halves, the poses, and one sentence on how far to trust them."""

    map: Volume
    sharpened: Volume
    local_resolution: Volume
    half_maps: tuple[Volume, Volume]
    poses: Poses
    half_set: Int[Tensor, " n"]
    fsc: Float[Tensor, " shells"]
    resolution: float
    status: str
    warnings: tuple[str, ...]
    metrics: dict[str, object]
