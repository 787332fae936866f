"""The families of maps among which ``methods/moments.py`` looks for one with given moments; each is a prior.

``ball``: all maps in a ball, negative density counted against them. ``gaussians``: sums of a few Gaussians, free in place, height and width.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.physics.polar import PolarBasis
from cryorbit.volumes.ball import BallBasis, BallSlices
from cryorbit.volumes.mixture import MixtureSlices, mixture_volume

_CHECKED = 1500  # points of the ball at which density should not be negative
_SPREAD = 0.3  # standard deviation of the first centres, over the radius of the ball
_WIDTH = 3.5  # first Gaussians are one over so many times the finest detail wide


class MapFamily(Protocol):
    """Maps told by a vector of real numbers, on rings ``k = 0 .. rings`` of a polar basis."""

    @property
    def polar(self) -> PolarBasis:
        """Of the slices."""

    def slices(self, parameters: Float[Tensor, " n"]) -> Complex[Tensor, "v m k"]:
        """Angular Fourier coefficients from every direction."""

    def penalty(self, parameters: Float[Tensor, " n"]) -> Float[Tensor, ""] | float:
        """What speaks against a map, whatever its moments: 0 to 1."""

    def start(self, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Some map."""

    def scaled(self, parameters: Float[Tensor, " n"], gain: float) -> Float[Tensor, " n"]:
        """The map times ``gain``."""

    def carried(self, parameters: Float[Tensor, " n"], rings: int) -> Float[Tensor, " m"]:
        """The map that ``parameters`` say in the family on ``rings`` rings, fewer than here."""

    def volume(self, parameters: Float[Tensor, " n"]) -> Float[Tensor, "d d d"]:
        """The map on its grid."""


@dataclass(frozen=True)
class BallMaps:
    """Sums of the functions of ``volumes/ball.py``; ``margin``: rings that they reach beyond those of ``polar``."""

    polar: PolarBasis
    rotations: Float[Tensor, "v 3 3"]
    degree: int
    margin: int

    @cached_property
    def basis(self) -> BallBasis:
        """Functions of the maps."""
        return BallBasis(self.polar.box, self.polar.radius, self.polar.rings + self.margin, self.degree)

    @cached_property
    def _slices(self) -> BallSlices:
        return BallSlices(self.basis, self.rotations, self.polar.rings, self.polar.orders)

    @cached_property
    def _points(self) -> Float[Tensor, "p n"]:
        inside = torch.randn(_CHECKED, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        reach = torch.rand(_CHECKED, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** (1 / 3)
        points = inside / inside.norm(dim=1, keepdim=True) * reach * self.polar.radius
        return self.basis.values(points.numpy()).float()

    def slices(self, parameters: Float[Tensor, " n"]) -> Complex[Tensor, "v m k"]:
        """By one constant matrix."""
        return self._slices(parameters)

    def penalty(self, parameters: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Share of the squares that is negative."""
        values = self._points.to(parameters) @ parameters
        return values.clamp(max=0).square().sum() / values.square().sum().clamp_min(1e-30)

    def start(self, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Random coefficients, fewer of high degree."""
        return torch.randn(len(self.basis), generator=generator) / (1 + self.basis.layout[:, 0].float())

    def scaled(self, parameters: Float[Tensor, " n"], gain: float) -> Float[Tensor, " n"]:
        """Linear."""
        return gain * parameters

    def carried(self, parameters: Float[Tensor, " n"], rings: int) -> Float[Tensor, " m"]:
        """Radial functions are the same, there are more of them."""
        inner = replace(self, polar=replace(self.polar, rings=rings))
        places = {tuple(row): i for i, row in enumerate(self.basis.layout.int().tolist())}
        out = parameters.new_zeros(len(self.basis))
        out[[places[tuple(row)] for row in inner.basis.layout.int().tolist()]] = parameters
        return out

    def volume(self, parameters: Float[Tensor, " n"]) -> Float[Tensor, "d d d"]:
        """Zero outside the ball."""
        return self.basis.volume(parameters)


@dataclass(frozen=True)
class MixtureMaps:
    """Sums of ``count`` Gaussians (``volumes/mixture.py``)."""

    polar: PolarBasis
    rotations: Float[Tensor, "v 3 3"]
    count: int

    @cached_property
    def _slices(self) -> MixtureSlices:
        return MixtureSlices(self.polar.box, self.rotations, self.polar.rings, self.polar.orders)

    def slices(self, parameters: Float[Tensor, " n"]) -> Complex[Tensor, "v m k"]:
        """In closed form."""
        return self._slices(parameters)

    def penalty(self, parameters: Float[Tensor, " n"]) -> float:
        """Nothing: they are never negative."""
        return 0.0

    def start(self, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Equal Gaussians about as wide as what the rings resolve, around the centre."""
        centres = _SPREAD * self.polar.radius * torch.randn(3 * self.count, generator=generator)
        width = math.log(self.polar.box / (_WIDTH * self.polar.rings))
        return torch.cat([centres, torch.zeros(self.count), torch.full((self.count,), width)])

    def scaled(self, parameters: Float[Tensor, " n"], gain: float) -> Float[Tensor, " n"]:
        """Heights times ``gain``."""
        out = parameters.clone()
        out[3 * self.count : 4 * self.count] += math.log(gain)
        return out

    def carried(self, parameters: Float[Tensor, " n"], rings: int) -> Float[Tensor, " n"]:
        """The same numbers."""
        return parameters

    def volume(self, parameters: Float[Tensor, " n"]) -> Float[Tensor, "d d d"]:
        """Every Gaussian on the grid."""
        return mixture_volume(parameters, self.polar.box)
