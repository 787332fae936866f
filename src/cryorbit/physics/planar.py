"""An image seen at unknown in-plane angles (papers/004 section 3): the 2-D alignment problem."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import grid_sample

from cryorbit.groups.so2 import SO2
from cryorbit.physics.fourier import circular_correlation


def rotate_images(images: Float[Tensor, "b d d"], angle: Float[Tensor, " b"]) -> Float[Tensor, "b d d"]:
    """Turn each image by its angle about the centre pixel ``D // 2``: ``(g . v)(x) = v(g^T x)``.

    Cubic interpolation (exact at multiples of 90 degrees), zero outside the image; differentiable in both arguments.

    Parameters
    ----------
    images
        (B, D, D) images in yx order.
    angle
        (B,) angles in radian; positive turns x towards y.
    """
    d = images.shape[-1]
    axis = torch.arange(d, dtype=images.dtype, device=images.device) - d // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    target = torch.stack([x, y], dim=-1).reshape(1, d * d, 2)
    source = target @ SO2().matrix(angle.to(images.dtype))  # row vectors: x^T g = (g^T x)^T
    return _sampled(images, source.reshape(-1, d, d, 2))


def _sampled(images: Float[Tensor, "b d d"], points: Float[Tensor, "b r a 2"]) -> Float[Tensor, "b r a"]:
    """Images at points (x, y) in pixels from their centre, by cubic interpolation."""
    d = images.shape[-1]
    at = (points + d // 2) * (2 / (d - 1)) - 1
    return grid_sample(images[:, None], at, mode="bicubic", padding_mode="zeros", align_corners=True)[:, 0]


@dataclass(frozen=True)
class PolarGrid:
    """Rings around the centre pixel of images of side D, on which a turn by a step of the grid is a shift along the angle.

    Attributes
    ----------
    box
        D in pixels.
    angles
        A, the points of a ring; a multiple of 4 makes quarter turns exact.
    """

    box: int
    angles: int = 64

    @property
    def rings(self) -> int:
        """R, at radii 0.5, 1.5, ... pixels inside the inscribed circle."""
        return self.box // 2 - 1

    def steps(self) -> Float[Tensor, " a"]:
        """The angles in radian, from 0."""
        return torch.arange(self.angles) * (2 * math.pi / self.angles)

    def nearest(self, angle: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The step next to each angle in radian."""
        return (angle * (self.angles / (2 * math.pi))).round().long() % self.angles

    def at(self, values: Float[Tensor, "b a"], angle: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Values on the grid at angles in radian between its points, linearly."""
        step = angle * (self.angles / (2 * math.pi))
        low = step.floor()
        near = torch.stack([low, low + 1], dim=-1).long() % self.angles
        after = step - low
        return (values.gather(-1, near) * torch.stack([1 - after, after], dim=-1)).sum(dim=-1)

    def away(self, step: Int[Tensor, " b"]) -> Float[Tensor, "b a"]:
        """Distance in radian of every angle of the grid from that of each step."""
        return SO2().distance(self.steps()[step][:, None], self.steps()).to(step.device)

    def sample(self, images: Float[Tensor, "b d d"]) -> Float[Tensor, "b r a"]:
        """Images on the rings; differentiable. One turned by t holds at angle phi what the image holds at ``phi - t``."""
        radius, angle = self._radii(images), self.steps().to(images)
        points = radius[:, None, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
        return _sampled(images, points.expand(len(images), -1, -1, -1))

    def overlap(self, shown: Float[Tensor, "b r a"], made: Float[Tensor, "b r a"]) -> Float[Tensor, "b a"]:
        """Sum over pixels of ``shown`` times ``made`` turned by each angle of the grid: a correlation along the rings, each pixel's area its
        weight."""
        return circular_correlation(made, self._area(shown) * shown).sum(dim=-2)

    def distance(self, shown: Float[Tensor, "b d d"], made: Float[Tensor, "b d d"]) -> Float[Tensor, "b a"]:
        """Squared distance of images from those ``made``, turned by each angle of the grid; never negative, as norms and overlaps are the
        same sums. Pixels outside the rings, where a turn leads out of the image, count as if nothing overlapped there."""
        one, two = self.sample(shown), self.sample(made)
        norms = (self._area(one) * (one.square() + two.square())).sum(dim=(1, 2))
        axis = torch.arange(self.box, device=shown.device) - self.box // 2
        outside = torch.hypot(axis[:, None].to(shown), axis.to(shown)) > self.rings
        corners = (shown.square() + made.square())[:, outside].sum(dim=1)
        return (norms + corners)[:, None] - 2 * self.overlap(one, two)

    def peak(self, score: Float[Tensor, "b a"], among: Bool[Tensor, "b a"] | None = None) -> Float[Tensor, " b"]:
        """Angle in radian of the highest score, or of the highest ``among`` some, by a parabola through it and its neighbours."""
        best = (score if among is None else score.masked_fill(~among, -math.inf)).argmax(dim=-1)
        low, high, top = (score.gather(-1, ((best + k) % self.angles)[:, None])[:, 0] for k in (-1, 1, 0))
        bend = (2 * top - low - high).clamp_min(torch.finfo(score.dtype).tiny)
        after = (0.5 * (high - low) / bend).clamp(-0.5, 0.5)
        return SO2().compose((best + after) * (2 * math.pi / self.angles), SO2().identity().to(score))

    def _area(self, like: Tensor) -> Float[Tensor, "r 1"]:
        """Pixels that a point of each ring stands for."""
        return (self._radii(like) * (2 * math.pi / self.angles))[:, None]

    def _radii(self, like: Tensor) -> Float[Tensor, " r"]:
        return torch.arange(self.rings, dtype=like.dtype, device=like.device) + 0.5


@dataclass(frozen=True)
class Planar:
    """Orbit model of in-plane rotations of one image, measured whole.

    Attributes
    ----------
    group
        SO(2).
    """

    group: SO2 = SO2()  # noqa: RUF009 (it has no state)

    def observe(self, signal: Float[Tensor, "d d"], g: Float[Tensor, " b"]) -> Float[Tensor, "b p"]:
        """Turned copies of the image ``signal``, one per row, flattened in yx order."""
        return rotate_images(signal.expand(len(g), -1, -1), g).flatten(1)
