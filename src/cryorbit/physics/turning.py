"""Images turned in Fourier space, and the adjoint: what ``physics/slicing`` is for maps, in the plane.

An image is divided by the transform of the interpolation kernel, zero-padded and transformed once (:func:`planes_of`); its copy turned by an
angle has the transform ``f^(g^T k)``, read from that plane by quadratic B-splines, nine points for each pixel (:func:`turned`).
:func:`insert_turned` is the exact adjoint. Angles are those of ``groups.so2`` and turn images as ``physics.planar.rotate_images`` does.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor

from cryorbit.groups.so2 import SO2
from cryorbit.physics.fourier import FourierDisk, fourier_to_image, image_to_fourier

OVERSAMPLING = 2


@dataclass(frozen=True)
class Planes:
    """Oversampled transforms of K images, or sums laid out like them.

    Attributes
    ----------
    data
        (K, G) values at ``y, x = -c .. c`` in steps of half a Fourier pixel, row by row, so that reversing a row negates the frequency.
    box
        Side D of the images in pixels.
    radius
        Largest ``|k|`` in Fourier pixels that may be read.
    """

    data: Shaped[Tensor, "k g"]
    box: int
    radius: float

    @property
    def half_width(self) -> int:
        """c."""
        return half_width(self.radius)

    def norm(self) -> Float[Tensor, " g"]:
        """``|k|`` in Fourier pixels of every point."""
        axis = torch.arange(-self.half_width, self.half_width + 1, device=self.data.device) / OVERSAMPLING
        return torch.hypot(axis[:, None], axis).flatten()


def half_width(radius: float) -> int:
    """Half width c of planes that are read up to ``radius`` Fourier pixels."""
    return math.ceil(radius * OVERSAMPLING) + 1


def _window(box: int, like: Tensor) -> Float[Tensor, "d d"]:
    x = torch.arange(box, device=like.device, dtype=like.dtype) - box // 2
    along = torch.sinc(x / (OVERSAMPLING * box)) ** 3
    return along[:, None] * along


def planes_of(images: Float[Tensor, "k d d"], radius: float) -> Planes:
    """Prepare images for reading up to ``radius`` Fourier pixels (at most D / 2); differentiable."""
    box = images.shape[-1]
    radius = min(float(radius), box / 2)
    side, c = OVERSAMPLING * box, half_width(radius)
    before = side // 2 - box // 2
    padded = torch.nn.functional.pad(images / _window(box, images), [before, side - box - before] * 2)
    transform = image_to_fourier(padded)
    axis = torch.arange(-c, c + 1, device=images.device)
    y, x = (v.flatten() for v in torch.meshgrid(axis, axis, indexing="ij"))
    x = torch.where(x > side // 2, x - side, torch.where(x < -(side // 2), x + side, x))
    sign = torch.where(x < 0, -1, 1)
    values = transform[:, (sign * y) % side, x.abs()]
    return Planes(torch.where(sign < 0, values.conj(), values), box, radius)


def _taps(
    angles: Float[Tensor, "*b"], disk: FourierDisk, radius: float
) -> Iterator[tuple[Int[Tensor, "*b p"], Float[Tensor, "*b p"]]]:
    """The nine points of a plane that each turned pixel reads, with their weights."""
    c = half_width(radius)
    k = disk.k.to(angles)
    at = (OVERSAMPLING * k) @ SO2().matrix(angles) + c  # rows: k^T g = (g^T k)^T
    base = at.round()
    f = at - base + 0.5
    down, up = 0.5 * (1 - f).square(), 0.5 * f.square()
    along = (down, 1 - down - up, up)
    low = base.to(torch.int64) - 1
    for row in range(3):
        for column in range(3):
            index = (low[..., 1] + row) * (2 * c + 1) + low[..., 0] + column
            yield index, along[row][..., 1] * along[column][..., 0]


def turned(
    planes: Planes, angles: Float[Tensor, "*b"], disk: FourierDisk, which: Int[Tensor, " b"] | None = None
) -> Complex[Tensor, "*k p"]:
    """Transforms of the images turned by ``angles``.

    Parameters
    ----------
    planes
        From :func:`planes_of`; its radius must cover the disk's.
    angles
        (A,) radian.
    disk
        Fourier pixels to read.
    which
        (A,) image that each angle belongs to; None turns every image by every angle.

    Returns
    -------
    (K, A, P), or (A, P) with ``which``; differentiable in planes and angles.
    """
    parts = (
        weight * (planes.data[:, index] if which is None else planes.data[which[:, None], index])
        for index, weight in _taps(angles, disk, planes.radius)
    )
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def insert_turned(
    sums: Planes,
    values: Shaped[Tensor, "b p"],
    angles: Float[Tensor, " b"],
    which: Int[Tensor, " b"],
    disk: FourierDisk,
) -> Planes:
    """``sums`` plus the adjoint of :func:`turned` on ``values`` (B, P), real or complex as the sums are."""
    flat = sums.data.flatten().clone()
    offset = which[:, None] * sums.data.shape[1]
    for index, weight in _taps(angles, disk, sums.radius):
        flat.index_add_(0, (index + offset).flatten(), (values * weight).to(flat.dtype).flatten())
    return Planes(flat.view_as(sums.data), sums.box, sums.radius)


def empty_planes(count: int, box: int, radius: float, like: Tensor) -> Planes:
    """Sums of nothing, of the type and on the device of ``like``."""
    side = 2 * half_width(min(float(radius), box / 2)) + 1
    return Planes(like.new_zeros(count, side * side), box, min(float(radius), box / 2))


def resized_planes(planes: Planes, radius: float) -> Planes:
    """The same values on planes for ``radius``: zero-padded where larger, cropped where smaller."""
    radius = min(float(radius), planes.box / 2)
    grow = half_width(radius) - planes.half_width
    side = 2 * planes.half_width + 1
    data = torch.nn.functional.pad(planes.data.view(-1, side, side), [grow] * 4)
    return Planes(data.flatten(1), planes.box, radius)


def averages(numerator: Planes, weight: Planes, regularisation: Float[Tensor, "#k shells"]) -> Float[Tensor, "k d d"]:
    """Images by regularised least squares from inserted transforms, ``numerator / (weight + regularisation)``.

    Parameters
    ----------
    numerator, weight
        Sums of :func:`insert_turned`, complex and real.
    regularisation
        (K, S) or (1, S) added to the weights, one value for each shell ``|k|`` (the last one serves beyond).
    """
    box, side, c = numerator.box, OVERSAMPLING * numerator.box, numerator.half_width
    total = numerator.data + numerator.data.flip(1).conj()  # every entry at k stands for its conjugate at -k
    norm = numerator.norm()
    shell = norm.round().to(torch.int64).clamp(max=regularisation.shape[1] - 1)
    below = weight.data + weight.data.flip(1) + regularisation[:, shell]
    keep = (norm <= numerator.radius) & (2 * norm < box) & (below > 0)
    ratio = torch.where(keep, total / torch.where(keep, below, 1.0), 0.0)
    square = ratio.view(-1, 2 * c + 1, 2 * c + 1)
    inner = min(c, (side - 1) // 2)
    axis = torch.arange(-inner, inner + 1, device=ratio.device)
    out = ratio.new_zeros(len(ratio), side, side // 2 + 1)
    out[:, axis % side, : inner + 1] = square[:, c - inner : c + inner + 1, c : c + inner + 1]
    start = side // 2 - box // 2
    image = fourier_to_image(out, side)[:, start : start + box, start : start + box]
    return image / _window(box, image)


def plane_power(planes: Planes, shells: int) -> Float[Tensor, "k shells"]:
    """Mean ``|f^|^2`` per shell 0 .. shells - 1 of each image."""
    shell = planes.norm().round().to(torch.int64)
    keep = shell < shells
    power = planes.data.abs().square()[:, keep]
    total = power.new_zeros(len(power), shells).index_add_(1, shell[keep], power)
    count = power.new_zeros(shells).index_add_(0, shell[keep], torch.ones_like(power[0]))
    return total / count.clamp_min(1)
