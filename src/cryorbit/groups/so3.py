"""Rotations of space: random elements, geodesic distance, exponential map, grids (HEALPix x in-plane angles)."""

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.conventions import euler_to_matrix

_SMALL = 1e-3  # square of an angle below which series take the place of quotients


def in_plane_count(order: int) -> int:
    """In-plane angles that match the spacing of HEALPix directions of ``order``: 6 * 2^order (RELION's choice)."""
    return 6 * 2**order


def grid_spacing(order: int) -> float:
    """Angular step of the grid of ``order`` in radian: 60 deg / 2^order."""
    return math.radians(60.0) / 2**order


def healpix_directions(order: int) -> tuple[np.ndarray, np.ndarray]:
    """(rot, tilt) in degrees, float64, of the 12 * 4^order HEALPix directions in nested order."""
    from astropy_healpix import HEALPix  # here: a fifth of the start of every command, for grids alone

    pixels = HEALPix(nside=2**order, order="nested")
    lon, lat = pixels.healpix_to_lonlat(np.arange(pixels.npix))
    return np.rad2deg(lon.to_value("rad")), 90.0 - np.rad2deg(lat.to_value("rad"))


@lru_cache(maxsize=8)
def healpix_grid(order: int) -> Float[Tensor, "g 3 3"]:
    """Uniform rotations: 12 * 4^order HEALPix directions x 6 * 2^order in-plane angles, in-plane fastest, float32.

    Directions are (rot, tilt) of RELION's A; psi is the in-plane angle. Orders 0, 1, 2, 3: 72, 576, 4608, 36864
    rotations, with steps of 60, 30, 15, 7.5 degrees.
    """
    rot, tilt = healpix_directions(order)
    psi = np.arange(in_plane_count(order)) * 360.0 / in_plane_count(order)
    angles = np.stack(
        [np.repeat(rot, len(psi)), np.repeat(tilt, len(psi)), np.tile(psi, len(rot))],
        axis=-1,
    )
    return torch.from_numpy(euler_to_matrix(angles)).to(torch.float32)


def half_grid(order: int) -> Float[Tensor, "h 3 3"]:
    """The half of :func:`healpix_grid` with psi < 180 degrees; :func:`half_turn` of it is the other half."""
    grid = healpix_grid(order).view(-1, in_plane_count(order), 3, 3)
    return grid[:, : in_plane_count(order) // 2].reshape(-1, 3, 3)


def half_turn(rotations: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3 3"]:
    """Poses whose images are turned by 180 degrees in plane: ``diag(-1, -1, 1) R``; their slices are the complex conjugates."""
    return rotations * rotations.new_tensor([-1.0, -1.0, 1.0])[:, None]


def random_rotations(n: int, generator: torch.Generator) -> Float[Tensor, "n 3 3"]:
    """Uniform (Haar) rotations, float32, from normalised Gaussian quaternions."""
    quaternion = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    x, y, z, w = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    return torch.stack(
        [
            torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
            torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
            torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
        ],
        dim=-2,
    ).to(torch.float32)


def exp(rotvec: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Rotation of a rotation vector in radian (Rodrigues); differentiable, at zero too."""
    square = rotvec.square().sum(dim=-1, keepdim=True)[..., None]
    small = square < _SMALL
    angle = torch.where(small, 1.0, square).sqrt()
    sine = torch.where(small, 1 - square / 6 * (1 - square / 20 * (1 - square / 42)), angle.sin() / angle)
    half = torch.where(small, 1 - square / 24 * (1 - square / 80), 2 * (angle / 2).sin() / angle)
    x, y, z = rotvec.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    outer = rotvec[..., :, None] * rotvec[..., None, :]
    cosine = 0.5 * half.square()  # (1 - cos a) / a^2
    return torch.eye(3).to(rotvec) * (1 - cosine * square) + cosine * outer + sine * cross


def log(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Rotation vector in radian, of length at most pi; differentiable but at pi."""
    r = rotation
    xx, yy, zz = r.diagonal(dim1=-2, dim2=-1).unbind(-1)
    a, b, c = r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]
    d, e, f = r[..., 2, 1] + r[..., 1, 2], r[..., 0, 2] + r[..., 2, 0], r[..., 1, 0] + r[..., 0, 1]
    rows = [1 + xx + yy + zz, a, b, c, a, 1 + xx - yy - zz, f, e, b, f, 1 - xx + yy - zz, d, c, e, d, 1 - xx - yy + zz]
    outer = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))  # 4 q q^T of the quaternion (w, x, y, z)
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None]
    row = outer.gather(-2, best.expand(*best.shape[:-1], 4))[..., 0, :]
    row = torch.where(row[..., :1] < 0, -row, row)
    real, axis = row[..., :1], row[..., 1:]
    square = axis.square().sum(dim=-1, keepdim=True)
    small = square < _SMALL * real.square()
    length = torch.where(small, 1.0, square).sqrt()
    tangent = square / torch.where(small, real, 1.0).square()
    near = (1 - tangent * (1 / 3 - tangent * (1 / 5 - tangent / 7))) / torch.where(small, real, 1.0)
    return 2 * axis * torch.where(small, near, torch.atan2(length, real) / length)


def log_uniform(rotvec: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b"]:
    """Log density of uniform (Haar) rotations in the space of rotation vectors, ``2 (1 - cos a) / (8 pi^2 a^2)`` at the angle a."""
    return 2 * torch.sinc(rotvec.norm(dim=-1) / (2 * math.pi)).log() - math.log(8 * math.pi**2)


def distance(a: Float[Tensor, "*b 3 3"], b: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b"]:
    """Geodesic angle between rotations in radian, accurate near 0 and pi."""
    chord = (a - b).flatten(-2).norm(dim=-1) / (2 * math.sqrt(2.0))
    return 2 * torch.asin(chord.clamp(max=1.0))


def orthonormalise(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3 3"]:
    """Nearest rotation matrix (special Procrustes): removes the drift of repeated products; not for gradients."""
    u, _, vh = torch.linalg.svd(rotation)
    last = torch.linalg.det(u @ vh)[..., None]
    return (u * torch.cat([torch.ones_like(last), torch.ones_like(last), last], dim=-1)[..., None, :]) @ vh


class SO3:
    """Rotations of space, (..., 3, 3) matrices acting on xyz columns: the functions above as an ``orbit.Group``."""

    def identity(self) -> Float[Tensor, "3 3"]:
        """No rotation."""
        return torch.eye(3)

    def random(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 3 3"]:
        """``n`` uniform rotations."""
        return random_rotations(n, generator)

    def quadrature(self, n: int) -> tuple[Float[Tensor, "g 3 3"], Float[Tensor, " g"]]:
        """The coarsest HEALPix grid of at least ``n`` rotations, equally weighted."""
        order = 0
        while 72 * 8**order < n:
            order += 1
        grid = healpix_grid(order).clone()
        return grid, torch.full((len(grid),), 1.0 / len(grid))

    def compose(self, a: Float[Tensor, "*b 3 3"], b: Float[Tensor, "*c 3 3"]) -> Float[Tensor, "*d 3 3"]:
        """Matrix product: ``b`` acts first."""
        return a @ b

    def inverse(self, a: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3 3"]:
        """The transpose."""
        return a.mT

    def distance(self, a: Float[Tensor, "*b 3 3"], b: Float[Tensor, "*c 3 3"]) -> Float[Tensor, "*d"]:
        """Geodesic angle in radian."""
        return distance(*torch.broadcast_tensors(a, b))
