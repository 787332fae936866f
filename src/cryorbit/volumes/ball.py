"""Maps in a ball by spherical harmonics times spherical Bessel functions: slices by one constant matrix, without interpolation.

``v(x) = sum a_lms n_ls j_l(u_ls r / R) Y_lm(x / r)`` inside ``r < R``, u_ls the zeros of j_l, Y real, coefficients real.
Its transform ``F(q) = sum_lm (-i)^l A_lm(|q|) Y_lm(q / |q|)`` has ``A_lm(k) = sum_s a_lms f_ls(k)`` with
``f_ls(k) = 4 pi n_ls int_0^R j_l(u_ls r / R) j_l(2 pi k r / D) r^2 dr``. The basis of Kam's method (Kam 1980; Levin et al. 2018).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Complex, Float
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import sph_harm_y, spherical_jn
from torch import Tensor

_NODES = 400  # of Gauss-Legendre quadrature along the radius
_BLOCK = 20_000  # voxels evaluated at a time


def bessel_zeros(degree: int, limit: float) -> NDArray[np.float64]:
    """Positive zeros of the spherical Bessel function j_l up to ``limit``; those of neighbouring degrees interlace."""
    zeros = np.arange(1, int(limit / np.pi) + degree + 3) * np.pi  # of j_0
    for order in range(1, degree + 1):
        zeros = np.array([brentq(lambda x, n=order: spherical_jn(n, x), a, b) for a, b in pairwise(zeros)])
    return np.asarray(zeros[zeros <= limit], dtype=np.float64)


def real_harmonics(degree: int, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal real spherical harmonics up to ``degree`` at unit vectors (P, 3), columns ``l^2 + l + m``: (P, (degree + 1)^2)."""
    polar, azimuth = np.arccos(np.clip(points[:, 2], -1, 1)), np.arctan2(points[:, 1], points[:, 0])
    out = np.empty((len(points), (degree + 1) ** 2))
    for n in range(degree + 1):
        for m in range(n + 1):
            value = sph_harm_y(n, m, polar, azimuth) * (np.sqrt(2) if m else 1)
            out[:, n * n + n + m], out[:, n * n + n - m] = value.real, value.imag if m else value.real
    return out


@dataclass(frozen=True)
class BallBasis:
    """The functions that a transform up to ``rings`` Fourier pixels can tell apart.

    Attributes
    ----------
    box
        Side D of the map in pixels; the ball is inscribed.
    radius
        R in pixels.
    rings
        Largest ``|k|``: zeros u_ls up to ``2 pi rings R / D`` are kept.
    degree
        Largest l; degrees without such a zero are left out.
    """

    box: int
    radius: float
    rings: int
    degree: int

    @cached_property
    def _radial(self) -> list[NDArray[np.float64]]:
        every = [bessel_zeros(n, 2 * np.pi * self.rings * self.radius / self.box) for n in range(self.degree + 1)]
        return [zeros for zeros in every if len(zeros)]

    @property
    def degrees(self) -> int:
        """Largest l with a function."""
        return len(self._radial) - 1

    @cached_property
    def layout(self) -> Float[Tensor, "n 3"]:
        """(l, m, s) of each coefficient."""
        rows = [(n, m, s) for n, zeros in enumerate(self._radial) for m in range(-n, n + 1) for s in range(len(zeros))]
        return torch.tensor(rows, dtype=torch.float64)

    @property
    def wavenumbers(self) -> Float[Tensor, " n"]:
        """``u_ls / R`` of each coefficient in radian per pixel: the Laplacian of its function is minus its square times it."""
        rows = self.layout.int().tolist()
        return torch.tensor([self._radial[n][s] / self.radius for n, _, s in rows], dtype=torch.float64)

    def __len__(self) -> int:
        return sum((2 * n + 1) * len(zeros) for n, zeros in enumerate(self._radial))

    def _norm(self, n: int, zeros: NDArray[np.float64]) -> NDArray[np.float64]:
        """``n_ls``: unit energy over the ball."""
        return np.sqrt(2 / self.radius**3) / np.abs(spherical_jn(n + 1, zeros))

    def transforms(self, radii: NDArray[np.float64]) -> list[Float[Tensor, "s k"]]:
        """``f_ls(k)`` at Fourier radii k, (S_l, K) for each l."""
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        r, w = 0.5 * self.radius * (nodes + 1), 0.5 * self.radius * weights
        out = []
        for n, zeros in enumerate(self._radial):
            inside = spherical_jn(n, zeros[:, None] * r / self.radius) * (w * r**2)
            wave = spherical_jn(n, 2 * np.pi / self.box * r[:, None] * radii)
            out.append(torch.from_numpy(4 * np.pi * self._norm(n, zeros)[:, None] * (inside @ wave)))
        return out

    def _voxels(self) -> Iterator[tuple[NDArray[np.int64], Float[Tensor, "p n"]]]:
        """Voxels inside the ball and every function there, a block at a time."""
        axis = np.arange(self.box) - self.box // 2
        z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
        points = np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float64)
        inside = np.flatnonzero(np.linalg.norm(points, axis=1) < self.radius)
        for part in np.array_split(inside, max(1, len(inside) // _BLOCK)):
            yield part, self.values(points[part])

    def volume(self, coefficients: Float[Tensor, " n"]) -> Float[Tensor, "d d d"]:
        """The map on its grid, zero outside the ball."""
        out = torch.zeros(self.box**3, dtype=torch.float64)
        for part, values in self._voxels():
            out[part] = values @ coefficients.detach().double().cpu()
        return out.view(self.box, self.box, self.box)

    def nearest(self, volume: Float[Tensor, "d d d"]) -> Float[Tensor, " n"]:
        """Coefficients of a map on its grid, by the sum over voxels for the integral: the functions are orthonormal (double precision)."""
        flat = volume.double().flatten()
        return torch.stack([values.mT @ flat[part] for part, values in self._voxels()]).sum(dim=0)

    def values(self, points: NDArray[np.float64]) -> Float[Tensor, "p n"]:
        """Every function at points (P, 3) = (x, y, z) in pixels from the centre."""
        r = np.linalg.norm(points, axis=1)
        unit = np.where(r[:, None] > 0, points / np.maximum(r, 1e-12)[:, None], np.array([0.0, 0.0, 1.0]))
        harmonics = real_harmonics(self.degrees, unit)
        columns = []
        for n, zeros in enumerate(self._radial):
            radial = spherical_jn(n, zeros * r[:, None] / self.radius) * self._norm(n, zeros)
            columns.append((harmonics[:, n * n : (n + 1) ** 2, None] * radial[:, None]).reshape(len(points), -1))
        return torch.from_numpy(np.concatenate(columns, axis=1))


class BallSlices:
    """Angular Fourier coefficients of slices of ball maps from given directions, by constant matrices.

    Parameters
    ----------
    basis
        Functions of the map.
    rotations
        (V, 3, 3): the image of R is the plane spanned by its first two rows.
    rings, orders
        ``k = 0 .. rings`` and ``m = 0 .. orders`` of the result (``physics/polar.py``).
    """

    def __init__(self, basis: BallBasis, rotations: Float[Tensor, "v 3 3"], rings: int, orders: int) -> None:
        self.basis = basis
        radial = basis.transforms(np.arange(rings + 1, dtype=np.float64))
        n, m, s = (basis.layout[:, i].long() for i in range(3))
        self._ring = torch.stack([radial[int(a)][int(c)] for a, c in zip(n, s, strict=True)]).float()  # (n, k)
        self._column = n * n + n + m
        count = 2 * max(orders, basis.degrees) + 2  # angles enough for every order
        phi = 2 * np.pi * np.arange(count) / count
        circle = np.stack([np.cos(phi), np.sin(phi), 0 * phi], axis=1)
        points = torch.einsum("vji,tj->vti", rotations.double().cpu(), torch.from_numpy(circle)).reshape(-1, 3)
        harmonics = torch.from_numpy(real_harmonics(basis.degrees, points.numpy())).view(len(rotations), count, -1)
        turn = torch.from_numpy(np.exp(-1j * np.arange(orders + 1)[:, None] * phi) / count)
        degree = torch.arange(basis.degrees + 1).repeat_interleave(2 * torch.arange(basis.degrees + 1) + 1)
        phase = torch.tensor([1, -1j, -1, 1j], dtype=torch.complex128)[degree % 4]
        matrix = torch.einsum("mt,vtc->vmc", turn, harmonics.to(turn)) * phase
        self._matrix = matrix.to(torch.complex64)  # (v, m, (l, m'))

    def __call__(self, coefficients: Float[Tensor, " n"]) -> Complex[Tensor, "v m k"]:
        """``c_m(k)`` of each slice; linear, differentiable."""
        return self._matrix @ self._shells(coefficients[None])[:, 0].to(torch.complex64)

    def batch(self, coefficients: Float[Tensor, "b n"]) -> Complex[Tensor, "b m v k"]:
        """The same for many maps, by one product: (B, M + 1, V, K + 1), directions last but one."""
        shells = self._shells(coefficients)
        views, orders, columns = self._matrix.shape
        flat = self._matrix.transpose(0, 1).reshape(-1, columns)
        values = torch.complex(*(part.contiguous() @ shells.flatten(1) for part in (flat.real, flat.imag)))
        return values.view(orders, views, *shells.shape[1:]).permute(2, 0, 1, 3)

    def _shells(self, coefficients: Float[Tensor, "b n"]) -> Float[Tensor, "c b k"]:
        """``A_lm(k)`` of each map, (l, m) first."""
        rows = coefficients.mT[:, :, None] * self._ring.to(coefficients)[:, None]
        return rows.new_zeros(self._matrix.shape[-1], *rows.shape[1:]).index_add(0, self._column, rows)
