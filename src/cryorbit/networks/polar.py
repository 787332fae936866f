"""Convolutions over rings about an image's centre: what is said of the image turns with it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cryorbit.errors import ConfigError
from cryorbit.networks.cnn import SMALLEST_SIDE, convolutions, convolving, perceptron, start_he

TURNS = 8
"""Directions of the plane from which an image is looked at."""


class RingEncoder(nn.Module):
    """The layers of :class:`~cryorbit.networks.cnn.ConvEncoder` on radius x angle, angles closed to a circle; a vector for each direction.

    The perceptron sees all features, begun at each direction in turn. An image turned by an eighth of a circle, about the pixel at its centre,
    so has the same vectors in other places: the one of direction t of the image is that of t + 1 of the turned one (exactly as far as the
    image can be sampled on rings).

    Parameters
    ----------
    side
        Of the images in pixels, at least 16; half as many rings, to the next multiple of 8.
    outputs
        Numbers per direction.
    filters, hidden, normalised, he, bfloat16, seed
        As for :class:`~cryorbit.networks.cnn.ConvEncoder`.

    Raises
    ------
    ConfigError
        CONF500 images too small for three blocks.
    """

    places: Tensor
    order: Tensor

    def __init__(
        self,
        side: int,
        outputs: int,
        *,
        filters: tuple[int, int, int] = (32, 64, 128),
        hidden: int = 512,
        normalised: bool = True,
        he: bool = True,
        bfloat16: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if side < 2 * SMALLEST_SIDE:
            raise ConfigError(
                "CONF500",
                f"images of {side} px are too small to encode in rings, expected {2 * SMALLEST_SIDE} px or more",
                "set polar=false",
            )
        rings, angles = SMALLEST_SIDE * math.ceil(side / (2 * SMALLEST_SIDE)), TURNS * SMALLEST_SIDE
        self.reduced = bfloat16
        radius = (torch.arange(rings) + 0.5) * ((side - 1 - side // 2) / rings)
        angle = torch.arange(angles) * (2 * math.pi / angles)
        around = torch.stack([angle.cos(), angle.sin()], dim=-1)
        at = side // 2 + radius[:, None, None] * around
        self.register_buffer("places", 2 * at / (side - 1) - 1, persistent=False)
        steps = torch.arange(TURNS)
        self.register_buffer("order", (steps[:, None] + steps) % TURNS, persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rows = filters[-1] * (rings // SMALLEST_SIDE)
            self.rings = nn.Sequential(*convolutions(filters, normalised=normalised, circular=True))
            self.body = nn.Sequential(*perceptron(rows * TURNS, hidden, normalised=normalised))
            self.last = nn.Linear(hidden, outputs)
            if he:
                start_he(nn.ModuleList([self.rings, self.body]), self.last)

    def forward(self, images: Float[Tensor, "b side side"]) -> Float[Tensor, "b turns outputs"]:
        """One vector per image and direction; images of variance about 1."""
        places = self.places.expand(len(images), -1, -1, -1)
        x = nn.functional.grid_sample(images[:, None], places, align_corners=True)
        with convolving(images.device, bfloat16=self.reduced):
            x = self.rings(x.contiguous(memory_format=torch.channels_last)).flatten(1, 2)
            x = self.body(x[:, :, self.order].movedim(2, 1).flatten(2).flatten(0, 1))
        return self.last(x.to(images.dtype)).unflatten(0, (-1, TURNS))
