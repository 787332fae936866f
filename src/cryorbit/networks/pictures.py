"""Networks between pictures and latent vectors: encoders in the plane and on rings, a decoder, and one that is a function of coordinates."""

import torch
from jaxtyping import Float, Int
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


class Rings(nn.Module):
    """Pictures on rings (``physics/planar.PolarGrid``) to features at every angle, which turn with the picture.

    Convolutions run around the rings without stride, so turning the picture by a step of the grid shifts what they give by one.
    """

    def __init__(self, rings: int) -> None:
        super().__init__()
        reduced, channels = (((rings + 1) // 2) + 1) // 2, 32
        self.features = 4 * channels
        self.rings = nn.ModuleList([nn.Conv2d(1, channels, (3, 5), (2, 1), (1, 0))])
        self.rings.append(nn.Conv2d(channels, 2 * channels, (3, 5), (2, 1), (1, 0)))
        self.whole = nn.Conv1d(2 * channels * reduced, self.features, 3)
        self.norms = nn.ModuleList([nn.GroupNorm(4, count * channels) for count in (1, 2, 4)])

    def forward(self, polar: Float[Tensor, "b r a"]) -> Float[Tensor, "b f a"]:
        x = polar[:, None]
        for layer, norm in zip(self.rings, self.norms, strict=False):
            x = torch.relu(norm(layer(nn.functional.pad(x, (2, 2, 0, 0), mode="circular"))))
        x = self.whole(nn.functional.pad(x.flatten(1, 2), (1, 1), mode="circular"))
        return torch.relu(self.norms[2](x))


class PolarEncoder(nn.Module):
    """Pictures on rings to ``outputs`` numbers that a turn by a step of the grid does not change: of what :class:`Rings` gives, the mean and
    the maximum over the angle, whatever the weights."""

    def __init__(self, rings: int, outputs: int, units: int = 256) -> None:
        super().__init__()
        self.rings = Rings(rings)
        self.last = nn.Sequential(nn.Linear(2 * self.rings.features, units), nn.ReLU(), nn.Linear(units, outputs))

    def forward(self, polar: Float[Tensor, "b r a"]) -> Float[Tensor, "b l"]:
        x = self.rings(polar)
        return self.last(torch.cat([x.mean(dim=-1), x.amax(dim=-1)], dim=1))


class DirectedEncoder(nn.Module):
    """Pictures on rings, read from one angle on, to ``outputs`` numbers; and how likely each angle is to be where to begin.

    Turned by a step of the grid, a picture scores the same one place on, and read from there gives the same numbers. Where it is read from
    is up to the prior too, which does not turn with it.
    """

    order: Tensor

    def __init__(self, rings: int, angles: int, outputs: int, units: int = 256, pooled: int = 4) -> None:
        super().__init__()
        self.rings, self.angles = Rings(rings), angles
        narrow = self.rings.features // 16
        self.narrow = nn.Conv1d(self.rings.features, narrow, 1)
        self.score = nn.Sequential(nn.Conv1d(narrow, units // 8, angles), nn.ReLU(), nn.Conv1d(units // 8, 1, 1))
        self.pool = nn.AvgPool1d(pooled)
        self.last = nn.Sequential(
            nn.Linear(self.rings.features * (angles // pooled), units), nn.ReLU(), nn.Linear(units, outputs)
        )
        steps = torch.arange(angles)
        self.register_buffer("order", (steps[:, None] + steps) % angles, persistent=False)

    def look(
        self, polar: Float[Tensor, "b r a"], prior: Float[Tensor, " a"]
    ) -> tuple[Float[Tensor, "b f a"], Float[Tensor, "b a"]]:
        """What there is to read at every angle, and the log chance of each angle under ``prior``."""
        features = self.rings(polar)
        around = nn.functional.pad(torch.relu(self.narrow(features)), (0, self.angles - 1), mode="circular")
        return features, (prior + self.score(around)[:, 0]).log_softmax(dim=-1)

    def read(self, features: Float[Tensor, "b f a"], begin: Int[Tensor, " b"]) -> Float[Tensor, "b l"]:
        """The numbers read from step ``begin`` on."""
        read = features.gather(-1, self.order[begin][:, None].expand_as(features))
        return self.last(self.pool(read).flatten(1))

    def forward(
        self, polar: Float[Tensor, "b r a"], prior: Float[Tensor, " a"], begin: Int[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b a"]]:
        """The numbers read from step ``begin`` on (the likeliest, where it is not given), and the log chance of every angle under ``prior``."""
        features, chance = self.look(polar, prior)
        return self.read(features, chance.argmax(dim=-1) if begin is None else begin), chance


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
