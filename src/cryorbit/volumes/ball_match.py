"""Ball maps turned, mirrored, and laid on each other over all rotations and both hands, by products of matrices.

A map turned by R, ``v(R^T x)``, has coefficients ``D^l(R) a_l`` (real Wigner matrices, one for each degree, the same for every radial
function); its mirror image ``v(-x)`` has ``(-1)^l a_l``. So the product of b with a turned by R is ``sum_l <D^l(R), C^l>`` with
``C^l = sum_s b_l.s a_l.s^T``, and all rotations of a grid are one matrix (Kovacs and Wriggers 2002 for the idea, there by FFT).
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.groups import so3
from cryorbit.volumes.ball import BallBasis, real_harmonics

_BLOCK = 200  # rotations at a time


def wigner(degree: int, rotations: Float[Tensor, "r 3 3"]) -> list[Float[Tensor, "r i j"]]:
    """``D^l(R)`` for l = 0 .. degree, float32: the real harmonics satisfy ``Y_j(R^T x) = sum_i D_ij Y_i(x)``, solved at random points."""
    points = np.random.default_rng(0).normal(size=(3 * (degree + 1) ** 2, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    columns = [slice(n * n, (n + 1) ** 2) for n in range(degree + 1)]
    here = real_harmonics(degree, points)
    inverse = [np.linalg.pinv(here[:, c]) for c in columns]
    parts: list[list[Tensor]] = [[] for _ in columns]
    for block in rotations.double().cpu().split(_BLOCK):
        there = real_harmonics(degree, np.einsum("pi,rij->rpj", points, block.numpy()).reshape(-1, 3))
        there = there.reshape(len(block), len(points), -1)
        for n, c in enumerate(columns):
            parts[n].append(torch.from_numpy(inverse[n] @ there[:, :, c]).float())
    return [torch.cat(part) for part in parts]


class BallMatch:
    """Finds, for pairs of maps of one basis, the rotation and hand of the largest product.

    Parameters
    ----------
    basis
        Of both maps.
    order
        HEALPix order of the grid that is searched; a finer one about its best point follows, down to a quarter of the spacing.
    degree
        Largest degree that the first search looks at.
    """

    def __init__(self, basis: BallBasis, order: int = 2, degree: int = 6) -> None:
        layout = basis.layout[:, 0]
        self._places = [torch.nonzero(layout == n)[:, 0] for n in range(basis.degrees + 1)]
        self._coarse = wigner(basis.degrees, so3.healpix_grid(order))
        looked = [d.flatten(1) for d in self._coarse[: degree + 1]]
        parity = torch.cat([torch.full((d.shape[1],), (-1.0) ** n) for n, d in enumerate(looked)])
        self._matrix, self._parity = torch.cat(looked, dim=1), parity
        axis = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64) * so3.grid_spacing(order)
        self._fine = wigner(basis.degrees, so3.exp(torch.cartesian_prod(axis, axis, axis)))
        self._near = torch.cat([d.flatten(1) for d in self._fine], dim=1)

    @torch.no_grad()
    def laid(self, moving: Float[Tensor, "b n"], fixed: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Each of ``moving`` turned, and mirrored where that is better, so that its product with ``fixed`` is largest."""
        pairs = [(fixed[:, p], moving[:, p]) for p in self._places]
        shape = [(len(fixed), 2 * n + 1, -1) for n in range(len(pairs))]
        cross = [b.reshape(s) @ a.reshape(s).mT for (b, a), s in zip(pairs, shape, strict=True)]
        flat = torch.cat([c.flatten(1) for c in cross], dim=1)[:, : len(self._parity)]
        straight, where = (flat @ self._matrix.mT).max(dim=1)
        mirrored, where_mirrored = ((flat * self._parity) @ self._matrix.mT).max(dim=1)
        hand = torch.where(mirrored > straight, -1.0, 1.0)
        where = torch.where(mirrored > straight, where_mirrored, where)
        signs = [hand[:, None, None] ** n for n in range(len(pairs))]
        rest = [coarse[where].mT @ c * s for coarse, c, s in zip(self._coarse, cross, signs, strict=True)]
        near = torch.cat([t.flatten(1) for t in rest], dim=1) @ self._near.mT
        best = near.argmax(dim=1)
        out = torch.empty_like(moving)
        for n, (place, (_, a)) in enumerate(zip(self._places, pairs, strict=True)):
            out[:, place] = (self._coarse[n][where] @ self._fine[n][best] @ a.reshape(shape[n]) * signs[n]).flatten(1)
        return out

    def mismatch(self, found: Float[Tensor, "b n"], truth: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
        """``1 -`` correlation (about zero) at the best rotation and hand; differentiable in ``found``, at that rotation."""
        laid = self.laid(truth, found.detach())
        return 1 - torch.nn.functional.cosine_similarity(found, laid, dim=1)


def turned(
    basis: BallBasis, coefficients: Float[Tensor, "b n"], rotation: Float[Tensor, "3 3"], mirrored: bool = False
) -> Float[Tensor, "b n"]:
    """Maps ``v(R^T x)``, or ``v(-R^T x)`` when ``mirrored``."""
    out, layout = torch.empty_like(coefficients), basis.layout[:, 0]
    for n, matrix in enumerate(wigner(basis.degrees, rotation[None])):
        place = torch.nonzero(layout == n)[:, 0]
        a = coefficients[:, place].reshape(len(out), 2 * n + 1, -1)
        out[:, place] = (matrix[0].to(a) @ a).flatten(1) * (-1 if mirrored and n % 2 else 1)
    return out
