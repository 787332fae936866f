"""Rotations of the plane, as angles in radian (counter-clockwise from x to y)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def wrap(angle: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The same angle in [-pi, pi]; differentiable with slope 1."""
    return angle - 2 * math.pi * torch.round(angle.detach() / (2 * math.pi))


class SO2:
    """Angles modulo a full turn."""

    def identity(self) -> Float[Tensor, ""]:
        """No rotation."""
        return torch.tensor(0.0)

    def random(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """``n`` uniform angles."""
        return wrap(2 * math.pi * torch.rand(n, generator=generator, device=generator.device))

    def quadrature(self, n: int) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"]]:
        """``n`` equal steps, exact for trigonometric polynomials of degree below ``n``."""
        return wrap(torch.arange(n) * (2 * math.pi / n)), torch.full((n,), 1.0 / n)

    def compose(self, a: Float[Tensor, "*b"], b: Float[Tensor, "*c"]) -> Float[Tensor, "*d"]:
        """Sum of angles."""
        return wrap(a + b)

    def inverse(self, a: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The angle back."""
        return -a

    def distance(self, a: Float[Tensor, "*b"], b: Float[Tensor, "*c"]) -> Float[Tensor, "*d"]:
        """Angle between two rotations in radian, the short way round."""
        return wrap(a - b).abs()

    def matrix(self, angle: Float[Tensor, "*b"]) -> Float[Tensor, "*b 2 2"]:
        """Rotation matrices that act on (x, y) columns."""
        c, s = torch.cos(angle), torch.sin(angle)
        return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
