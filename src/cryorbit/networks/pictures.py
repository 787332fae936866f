"""Networks between pictures and latent vectors: a convolutional encoder and decoder, and a decoder that is a function of coordinates."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Encoder(nn.Module):
    """Pictures to ``outputs`` numbers: two strided convolutions, two linear layers.

    papers/004 does not state its layers; these are ours. Group instead of batch normalisation: what a picture gives does not depend on
    the others.
    """

    def __init__(self, side: int, outputs: int, channels: int = 32, units: int = 256) -> None:
        super().__init__()
        reduced = (((side + 1) // 2) + 1) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, 1),
            nn.GroupNorm(4, channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1),
            nn.GroupNorm(4, 2 * channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * reduced**2, units),
            nn.ReLU(),
            nn.Linear(units, outputs),
        )

    def forward(self, pictures: Float[Tensor, "b d d"]) -> Float[Tensor, "b l"]:
        return self.layers(pictures[:, None])


class Decoder(nn.Module):
    """``latent`` numbers to a picture: a linear layer and two transposed convolutions."""

    def __init__(self, side: int, latent: int, channels: int = 32, units: int = 256) -> None:
        super().__init__()
        self.side, self.reduced, self.channels = side, (side + 3) // 4, channels
        self.full = nn.Sequential(
            nn.Linear(latent, units), nn.ReLU(), nn.Linear(units, 2 * channels * self.reduced**2), nn.ReLU()
        )
        self.grow = nn.Sequential(
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(channels, 1, 4, 2, 1)
        )

    def forward(self, latent: Float[Tensor, "b l"]) -> Float[Tensor, "b d d"]:
        field = self.full(latent).view(-1, 2 * self.channels, self.reduced, self.reduced)
        return self.grow(field)[:, 0, : self.side, : self.side]


class CoordinateDecoder(nn.Module):
    """The value of a picture at any point, given latent numbers (Bepler et al. 2019, the spatial decoder)."""

    def __init__(self, latent: int, units: int = 64) -> None:
        super().__init__()
        self.point, self.content = nn.Linear(2, units), nn.Linear(latent, units, bias=False)
        self.layers = nn.Sequential(nn.Tanh(), nn.Linear(units, units), nn.Tanh(), nn.Linear(units, 1))

    def forward(self, points: Float[Tensor, "b p 2"], latent: Float[Tensor, "b l"]) -> Float[Tensor, "b p"]:
        return self.layers(self.point(points) + self.content(latent)[:, None])[..., 0]


def coordinates(side: int, like: Tensor) -> Float[Tensor, "p 2"]:
    """(x, y) of every pixel, the centre index at 0 and the border near 1, row by row."""
    axis = (torch.arange(side, device=like.device, dtype=like.dtype) - side // 2) / (side / 2)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)
