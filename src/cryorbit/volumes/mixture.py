"""Maps as sums of Gaussians: compact, never negative, few numbers; their slices are known in closed form.

``v(x) = sum_i w_i exp(-|x - x_i|^2 / (2 s_i^2))`` has the transform
``F(q) = sum_i w_i (2 pi)^(3/2) s_i^3 exp(-2 pi^2 s_i^2 |q|^2 / D^2) exp(-2 pi i q . x_i / D)``, x and s in pixels, q in Fourier pixels.
Parameters are one vector of 5 K numbers: K centres (x, y, z) from the map's centre, K logarithms of w, K logarithms of s.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def unpacked(
    parameters: Float[Tensor, " n"],
) -> tuple[Float[Tensor, "k 3"], Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Centres, heights and standard deviations."""
    count = len(parameters) // 5
    logarithms = parameters[3 * count :].view(2, count)
    return parameters[: 3 * count].view(count, 3), logarithms[0].exp(), logarithms[1].exp()


def mixture_volume(parameters: Float[Tensor, " n"], box: int) -> Float[Tensor, "d d d"]:
    """The map on its grid of ``box`` voxels a side."""
    centres, heights, widths = unpacked(parameters)
    axis = torch.arange(box).to(parameters) - box // 2
    x, y, z = torch.exp(-0.5 * ((axis - centres.mT[..., None]) / widths[:, None]).square())  # each (k, box)
    return torch.einsum("k,kz,ky,kx->zyx", heights, z, y, x)


class MixtureSlices:
    """Angular Fourier coefficients of slices of sums of Gaussians; Gaussians should lie within the circle that ``orders`` was chosen for.

    Parameters
    ----------
    box
        Side D of the map in pixels.
    rotations
        (V, 3, 3): the image of R is the plane spanned by its first two rows.
    rings, orders
        ``k = 0 .. rings`` and ``m = 0 .. orders`` of the result (``physics/polar.py``).
    """

    def __init__(self, box: int, rotations: Float[Tensor, "v 3 3"], rings: int, orders: int) -> None:
        self.box, self.rings, self.orders = box, rings, orders
        order = torch.arange(orders + 1, dtype=torch.float64)[:, None]
        phi = math.pi / (orders + 1) * order[:, 0]  # half the circle: the other is the conjugate
        circle = torch.stack([phi.cos(), phi.sin()], dim=1)
        self._turn = torch.polar(torch.full_like(order * phi, 0.5 / (orders + 1)), -order * phi)  # (m, t)
        self._parity = (-1) ** order
        self.directions = torch.einsum("vji,tj->vti", rotations[:, :2].double(), circle)

    def __call__(self, parameters: Float[Tensor, " n"]) -> Complex[Tensor, "v m k"]:
        """``c_m(k)`` of each slice; differentiable."""
        centres, heights, widths = unpacked(parameters)
        along = self.directions.to(parameters) @ centres.mT * (-2 * math.pi / self.box)
        wave = torch.polar(torch.ones_like(along), along)  # of k = 1, (v, t, gaussians)
        ring = torch.arange(self.rings + 1).to(parameters) / self.box
        falloff = torch.exp(-2 * (math.pi * widths[:, None] * ring).square())
        gain = (heights * (math.sqrt(2 * math.pi) * widths) ** 3)[:, None] * falloff
        power, rings = torch.ones_like(wave), []
        for k in range(self.rings + 1):
            rings.append(power @ gain[:, k].to(wave))
            power = power * wave
        half = torch.stack(rings, dim=2)
        turn = self._turn.to(half)
        return turn @ half + self._parity.to(half) * (turn @ half.conj())  # exp(-i m pi) = (-1)^m
