"""Pictures in one canonical orientation, and the turned, noisy copies a method is given (papers/004 section 4)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.conventions import centre
from cryorbit.errors import ConfigError
from cryorbit.groups.so2 import SO2
from cryorbit.physics.fourier import disk_to_images
from cryorbit.physics.planar import rotate_images
from cryorbit.simulate.atoms import AtomicModel
from cryorbit.simulate.particles import make_projector

SMALLEST_SIDE = 8


@dataclass(frozen=True)
class TurnedPictures:
    """Pictures (N, D, D) with values from 0 to 1, shown at random angles.

    Attributes
    ----------
    pictures
        In their canonical orientation, without noise.
    spread
        Standard deviation of the angle in radian (papers/004: pi / 4 for MNIST); infinite for uniform angles.
    noise
        Standard deviation of what is added to each pixel of the turned copy.
    """

    pictures: Float[Tensor, "n d d"]
    spread: float = math.inf
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.spread > 0 or not 0 <= self.noise < math.inf:
            raise ConfigError(
                "CONF430",
                f"a spread of {self.spread} and noise of {self.noise} make no set",
                "give spread > 0, noise >= 0",
            )
        largest = float(self.pictures.abs().max()) if len(self.pictures) else 0.0
        if self.side < SMALLEST_SIDE or not largest > 0:
            raise ConfigError(
                "CONF434",
                f"{len(self.pictures)} pictures of {self.side} px, the largest value {largest:g}, make no set",
                f"give pictures of at least {SMALLEST_SIDE} px that show something",
            )

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def side(self) -> int:
        """D."""
        return self.pictures.shape[-1]

    def draw(
        self, indices: Int[Tensor, " b"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "b d d"], Float[Tensor, "b d d"], Float[Tensor, " b"]]:
        """What is shown (turned, with noise), the canonical pictures, and the angles between them in radian."""
        pictures = self.pictures[indices]
        if math.isinf(self.spread):
            angles = SO2().random(len(indices), generator)
        else:
            angles = self.spread * torch.randn(len(indices), generator=generator)
        shown = rotate_images(pictures, angles)
        return shown + self.noise * torch.randn(shown.shape, generator=generator), pictures, angles


def side_views(
    model: AtomicModel, count: int, box: int, generator: torch.Generator, tilt: float = math.radians(34.0)
) -> Float[Tensor, "n d d"]:
    """Projections of a molecule lying along x, each scaled to 0 .. 1: any turn about its long axis, the axis tilted out of the image by up to
    ``tilt`` radian. An elongated molecule has one in-plane angle in all of them, as the projections of 5HDB in papers/004.

    The pixel is as large as lets the molecule fill 80 % of the box.
    """
    positions = model.positions - model.positions.mean(dim=0)
    axes = torch.linalg.svd(positions.double(), full_matrices=False).Vh.to(torch.float32)
    axes[2] *= torch.linalg.det(axes)  # no mirror
    extent = 2 * float(positions.norm(dim=1).max())
    projector = make_projector(model, box, extent / (0.8 * box), fast=True)
    roll = 2 * math.pi * torch.rand(count, generator=generator)
    dip = tilt * (2 * torch.rand(count, generator=generator) - 1)
    zero, one = torch.zeros(count), torch.ones(count)
    about_x = [[one, zero, zero], [zero, roll.cos(), -roll.sin()], [zero, roll.sin(), roll.cos()]]
    about_y = [[dip.cos(), zero, dip.sin()], [zero, one, zero], [-dip.sin(), zero, dip.cos()]]
    turns = [torch.stack([torch.stack(row, -1) for row in m], -2) for m in (about_y, about_x)]
    parts = (turns[0] @ turns[1] @ axes).split(256)
    images = torch.cat([disk_to_images(projector(part), projector.disk) for part in parts])
    low, high = images.amin(dim=(1, 2), keepdim=True), images.amax(dim=(1, 2), keepdim=True)
    return inside_disc((images - low) / (high - low))


def inside_disc(pictures: Float[Tensor, "n d d"]) -> Float[Tensor, "n d d"]:
    """Zero outside the inscribed disc, so that no turn cuts anything off."""
    side = pictures.shape[-1]
    axis = torch.arange(side, dtype=pictures.dtype) - centre(side)
    return pictures * (torch.hypot(axis[:, None], axis) <= side // 2 - 1)
