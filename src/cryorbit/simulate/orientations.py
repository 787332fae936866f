"""Where particles face: uniform, von Mises-Fisher mixtures, a cone, or preferred views. The in-plane angle is always
uniform.

A view direction is the third row of RELION's A, ``(sin tilt cos rot, sin tilt sin rot, cos tilt)``.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.conventions import euler_to_matrix
from cryorbit.errors import ConfigError
from cryorbit.groups.so3 import random_rotations

Kind = Literal["uniform", "vmf", "cone", "preferred"]
_MAX_COMPONENTS = 1000
KINDS: tuple[Kind, ...] = ("uniform", "vmf", "cone", "preferred")


@dataclass(frozen=True)
class Orientations:
    """A density on rotations.

    Attributes
    ----------
    kind
        ``uniform``: Haar. ``vmf``: equal mixture of ``components`` von Mises-Fisher densities of ``concentration``
        about random directions. ``cone``: view directions uniform within ``half_angle`` of z; papers/002 section 6.3
        is 15 degrees (tilt in -15 .. 15). ``preferred``: ``fraction`` of the particles within ``half_angle`` of
        ``components`` random directions, the rest uniform.
    concentration
        Kappa of each von Mises-Fisher component.
    components
        How many directions are drawn for ``vmf`` and ``preferred``.
    half_angle
        Radian from a cone's axis to its edge.
    fraction
        Part of the particles in the cones of ``preferred``.
    """

    kind: Kind = "uniform"
    concentration: float = 10.0
    components: int = 3
    half_angle: float = math.radians(15.0)
    fraction: float = 0.8

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("CONF310", f"orientations are one of {', '.join(KINDS)}, found {self.kind!r}")
        if not 0 < self.concentration <= 1e6:
            raise ConfigError(
                "CONF311", f"the concentration must be positive and at most 1e6, found {self.concentration:g}"
            )
        if not 1 <= self.components <= _MAX_COMPONENTS:
            raise ConfigError(
                "CONF312", f"from 1 to {_MAX_COMPONENTS} components can be drawn, found {self.components}"
            )
        if not 0 < self.half_angle <= math.pi:
            raise ConfigError(
                "CONF313", f"the cone's half angle must be in (0, 180] degrees, found {math.degrees(self.half_angle):g}"
            )
        if not 0 <= self.fraction <= 1:
            raise ConfigError("CONF314", f"the fraction of preferred views must be in [0, 1], found {self.fraction:g}")

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "n 3 3"]:
        """``count`` rotations, float32."""
        if self.kind == "uniform":
            return random_rotations(count, generator)
        if self.kind == "cone":
            axes = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
        else:
            axes = random_directions(self.components, generator)
        axis = axes[torch.randint(len(axes), (count,), generator=generator)]
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        if self.kind == "vmf":
            # Inverse of the cumulative density of the cosine on the 2-sphere (Wood, Commun. Stat. 23, 1994, 157).
            kappa = self.concentration
            cosine = 1 + torch.log(u + (1 - u) * math.exp(-2 * kappa)) / kappa
        else:
            cosine = 1 - u * (1 - math.cos(self.half_angle))
        views = _about(
            axis, cosine.clamp(-1, 1), 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
        )
        rotations = rotations_with_views(
            views, 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
        )
        if self.kind == "preferred":
            other = torch.rand(count, generator=generator) >= self.fraction
            rotations[other] = random_rotations(count, generator)[other]
        return rotations


def random_directions(count: int, generator: torch.Generator) -> Float[Tensor, "n 3"]:
    """Uniform unit vectors, float64."""
    v = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return v / v.norm(dim=-1, keepdim=True)


def rotations_with_views(views: Float[Tensor, "n 3"], psi: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Rotations with the view directions ``views`` (unit, third row) and in-plane angles ``psi`` in radian, float32."""
    rot = torch.atan2(views[:, 1], views[:, 0])
    tilt = torch.atan2(torch.hypot(views[:, 0], views[:, 1]), views[:, 2])
    angles = torch.rad2deg(torch.stack([rot, tilt, psi], dim=-1))
    return torch.from_numpy(euler_to_matrix(angles.to(torch.float64).numpy())).to(torch.float32)


def _about(axis: Tensor, cosine: Tensor, azimuth: Tensor) -> Tensor:
    """Unit vectors at an angle of given cosine from ``axis`` (N, 3), at an azimuth about it."""
    helper = torch.eye(3, dtype=axis.dtype)[axis.abs().argmin(dim=-1)]
    first = torch.linalg.cross(axis, helper)
    first = first / first.norm(dim=-1, keepdim=True)
    second = torch.linalg.cross(axis, first)
    sine = (1 - cosine**2).clamp(min=0).sqrt()
    around = torch.cos(azimuth)[:, None] * first + torch.sin(azimuth)[:, None] * second
    return cosine[:, None] * axis + sine[:, None] * around
