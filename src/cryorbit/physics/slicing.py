"""Fourier-slice projection, its adjoint, and pose derivatives (papers/002 eq. 9-13; the projector of papers/001).

A map is divided by the transform of the interpolation kernel, zero-padded by the oversampling factor and transformed
once (:func:`slicing_grid`); each projection is then a read of the central plane ``R^T (kx, ky, 0)`` by quadratic
B-splines, 27 points for each pixel (:func:`slice_grid`). :func:`insert_slices` is the exact adjoint of that read.
Everything is differentiable where a gradient makes sense, and the gradients are continuous.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Complex, Float, Shaped
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.physics import kernels
from cryorbit.physics.fourier import FourierDisk, disk_to_images, fourier_disk, fourier_to_volume, volume_to_fourier


@dataclass(frozen=True)
class SlicingGrid:
    """Oversampled transform of a map, cropped to what slices of ``radius`` read.

    Attributes
    ----------
    data
        (2c+1, 2c+1, c+2) transform at ``z, y = -c .. c``, ``x = -1 .. c`` in steps of 1 / oversampling Fourier pixels
        (:func:`half_width` gives c). The column at ``x = -1``, the Hermitian mate of ``x = 1``, is there because reads
        next to ``x = 0`` reach it.
    box
        Side D of the map in pixels.
    oversampling
        Grid points per Fourier pixel.
    radius
        Largest ``|k|`` in Fourier pixels that may be sliced.
    """

    data: Complex[Tensor, "z y x"]
    box: int
    oversampling: int
    radius: float

    def detach(self) -> "SlicingGrid":
        """The same grid cut from the autograd graph."""
        return SlicingGrid(self.data.detach(), self.box, self.oversampling, self.radius)


@dataclass(frozen=True)
class Accumulator:
    """Sums of inserted slices on a grid laid out as :class:`SlicingGrid`: complex ``numerator`` and real ``weight``.

    A slice and its Hermitian mate are one entry, put where ``x >= 0`` was read: near ``x = 0`` the sums are complete only
    after :func:`completed`.
    """

    numerator: Complex[Tensor, "z y x"]
    weight: Float[Tensor, "z y x"]
    box: int
    oversampling: int
    radius: float

    def __add__(self, other: "Accumulator") -> "Accumulator":
        if self.numerator.shape != other.numerator.shape or self.box != other.box:
            raise ConfigError("CONF118", f"accumulators of {_describe(self)} and {_describe(other)} cannot be added")
        return Accumulator(
            self.numerator + other.numerator, self.weight + other.weight, self.box, self.oversampling, self.radius
        )

    def scaled(self, factor: float) -> "Accumulator":
        """Both sums times ``factor`` (forgetting in online EM)."""
        return Accumulator(self.numerator * factor, self.weight * factor, self.box, self.oversampling, self.radius)


def _describe(x: SlicingGrid | Accumulator | FourierDisk) -> str:
    oversampling = "" if isinstance(x, FourierDisk) else f", oversampling {x.oversampling}"
    return f"box {x.box}, radius {x.radius:g}{oversampling}"


def half_width(radius: float, oversampling: int) -> int:
    """Half width c of the grid for slices up to ``radius``: reads reach one point beyond the one nearest to ``q``."""
    return math.ceil(radius * oversampling) + 1


def _checked(box: int, radius: float, oversampling: int) -> float:
    if oversampling < 1:
        raise ConfigError("CONF103", f"oversampling must be at least 1, found {oversampling}")
    if radius <= 0:
        raise ConfigError("CONF104", f"the slicing radius must be positive, found {radius}")
    return min(float(radius), box / 2)


def spline_window(side: int, fine: int, like: Tensor) -> Float[Tensor, "d d d"]:
    """Transform of the quadratic B-spline of a grid of ``fine`` points a side, ``sinc^3(x / fine)`` per axis, at the central ``side``."""
    x = torch.arange(side, device=like.device, dtype=like.dtype) - side // 2
    w = torch.sinc(x / fine) ** 3
    return w[:, None, None] * w[:, None] * w


def _over_window(volume: Tensor, oversampling: int) -> Tensor:
    side = volume.shape[-1]
    return volume / spline_window(side, oversampling * side, volume)


def slicing_grid(volume: Float[Tensor, "d d d"], radius: float, oversampling: int = 2) -> SlicingGrid:
    """Prepare a map for slicing; differentiable in ``volume``.

    Parameters
    ----------
    volume
        (D, D, D) real map, centre at ``D // 2``, D even or odd.
    radius
        Largest ``|k|`` in Fourier pixels to be sliced; cut to D / 2.
    oversampling
        Grid points per Fourier pixel. 1 is fast and poor, 2 the default, 3 for references (errors:
        ``docs/projector.md``).
    """
    box = volume.shape[-1]
    radius = _checked(box, radius, oversampling)
    data = _half_grid(_over_window(volume, oversampling), oversampling, half_width(radius, oversampling))
    return SlicingGrid(data, box, oversampling, radius)


def _half_grid(volume: Tensor, oversampling: int, c: int) -> Tensor:
    """Oversampled transform at half-width c, with its column at ``x = -1``; beyond Nyquist it wraps."""
    box = volume.shape[-1]
    side = oversampling * box
    before = side // 2 - box // 2
    transform = volume_to_fourier(torch.nn.functional.pad(volume, [before, side - box - before] * 3))
    axis = torch.arange(-c, c + 1, device=transform.device)
    stored = min(c, side // 2)
    near = transform[..., : stored + 1].index_select(0, axis % side).index_select(1, axis % side)
    beyond = (side - torch.arange(stored + 1, c + 1, device=transform.device)) % side
    far = transform.index_select(2, beyond).index_select(0, (-axis) % side).index_select(1, (-axis) % side)
    mate = near[..., 1:2].flip(0, 1)
    return torch.cat([mate.conj(), near, far.conj()], dim=-1)


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, data: Tensor, rotations: Tensor, kx: Tensor, ky: Tensor, oversampling: int, backend: str | None
    ) -> Tensor:
        ctx.save_for_backward(data, rotations, kx, ky)
        ctx.oversampling, ctx.backend = oversampling, backend
        return kernels.select(data.device, backend).slice_forward(data, rotations, kx, ky, oversampling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        data, rotations, kx, ky = ctx.saved_tensors
        run = kernels.select(data.device, ctx.backend).slice_backward
        need = ctx.needs_input_grad
        to_data, to_rotations = run(
            gradient.resolve_conj().contiguous(), data, rotations, kx, ky, ctx.oversampling, need[0], need[1]
        )
        return to_data, to_rotations, None, None, None, None


def checked_rotations(rotations: Tensor, radius: float, oversampling: int, like: Tensor) -> Tensor:
    """Rotations in the working precision, refused when they would read outside the grid (or hold NaN)."""
    if len(rotations):
        x, y = rotations.detach()[:, :2].to(torch.float64).unbind(1)
        a, b, d = (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)
        largest = 0.5 * (a + d) + torch.hypot(0.5 * (a - d), b)  # eigenvalue of the Gram matrix of the two rows
        stretch = math.sqrt(float(largest.max()))
        if not stretch * radius * oversampling < half_width(radius, oversampling) - 0.6:  # 0.5, and 0.1 for rounding
            raise DataError(
                "DATA101",
                f"a rotation stretches vectors by {stretch:.4g}, expected 1",
                "re-orthonormalise the matrices",
            )
    return rotations.to(device=like.device, dtype=like.dtype.to_real()).contiguous()


def checked_disk(disk: FourierDisk, grid: SlicingGrid) -> FourierDisk:
    if disk.box != grid.box or disk.radius > grid.radius + 1e-6:
        raise ConfigError("CONF105", f"a grid of {_describe(grid)} cannot be sliced on a disk of {_describe(disk)}")
    return disk.to(grid.data.device)


def slice_grid(
    grid: SlicingGrid, rotations: Float[Tensor, "b 3 3"], disk: FourierDisk, *, backend: str | None = None
) -> Complex[Tensor, "b p"]:
    """Transforms of projections, ``v^(R^T (kx, ky, 0))`` (papers/002 eq. 9-11); differentiable in grid and rotations.

    Parameters
    ----------
    grid
        From :func:`slicing_grid`; its radius must cover the disk's.
    rotations
        (B, 3, 3) rotation matrices R. The gradient is the exact derivative of the B-spline interpolant, in the
        ambient 3 x 3 matrix.
    disk
        Fourier pixels to read.
    backend
        Kernel to use instead of the device's own (tests).

    Raises
    ------
    ConfigError
        Box or radius of grid and disk do not fit.
    DataError
        A rotation is not finite or stretches vectors beyond the grid.
    """
    disk = checked_disk(disk, grid)
    rotations = checked_rotations(rotations, grid.radius, grid.oversampling, grid.data)
    return _Slice.apply(grid.data.contiguous(), rotations, disk.kx, disk.ky, grid.oversampling, backend)


def project(
    volume: Float[Tensor, "d d d"], rotations: Float[Tensor, "b 3 3"], oversampling: int = 2
) -> Float[Tensor, "b d d"]:
    """Real-space projections of a map along z of the rotated frame, up to Nyquist; differentiable in both arguments."""
    box = volume.shape[-1]
    disk = fourier_disk(box)
    return disk_to_images(slice_grid(slicing_grid(volume, box / 2, oversampling), rotations, disk), disk)


def insert_slices(
    values: Complex[Tensor, "b p"],
    weights: Float[Tensor, "b p"],
    rotations: Float[Tensor, "b 3 3"],
    disk: FourierDisk,
    oversampling: int = 2,
    out: Accumulator | None = None,
    *,
    backend: str | None = None,
) -> Accumulator:
    """Exact adjoint of :func:`slice_grid` on ``values``, with ``weights`` inserted beside them.

    ``Re <slice_grid(v), u> = Re <v, insert_slices(u).numerator>`` over the stored half grid. Results do not depend on
    the number of threads.

    Parameters
    ----------
    values, weights
        (B, P) what goes into numerator and weight, for example ``ctf * image / variance`` and ``ctf^2 / variance``.
    rotations
        (B, 3, 3).
    disk
        Fourier pixels of the columns.
    oversampling
        Grid points per Fourier pixel.
    out
        Sums so far, added to in place: a grid for large images is too big to be made anew for every few of them.
    backend
        Kernel to use instead of the device's own (tests).
    """
    radius = _checked(disk.box, disk.radius, oversampling)
    c = half_width(radius, oversampling)
    shape = (2 * c + 1, 2 * c + 1, c + 2)
    if out is None:
        numerator = values.new_zeros(shape)
        out = Accumulator(numerator, torch.zeros_like(numerator.real), disk.box, oversampling, radius)
    elif out.numerator.shape != shape or out.box != disk.box:
        found = f"{_describe(out)}; these slices need {_describe(disk)}, oversampling {oversampling}"
        raise ConfigError("CONF102", f"the sums to add to are of {found}")
    rotations = checked_rotations(rotations.detach(), radius, oversampling, out.numerator)
    disk = disk.to(values.device)
    run = kernels.select(values.device, backend).insert
    run(
        values.detach().resolve_conj().to(out.numerator.dtype).contiguous(),
        weights.detach().to(out.weight.dtype).contiguous(),
        rotations,
        disk.kx,
        disk.ky,
        oversampling,
        out.numerator,
        out.weight,
    )
    return out


def insert_symmetric(
    values: Complex[Tensor, "b p"],
    weights: Float[Tensor, "b p"],
    rotations: Float[Tensor, "b 3 3"],
    symmetry: Float[Tensor, "s 3 3"],
    disk: FourierDisk,
    out: Accumulator | None = None,
    oversampling: int = 2,
) -> Accumulator:
    """:func:`insert_slices` at every mate ``R g`` of the rotations under the point group of the map."""
    for element in symmetry:
        out = insert_slices(values, weights, rotations @ element, disk, oversampling, out=out)
    if out is None:
        raise ConfigError("CONF109", "a point group without elements, expected at least the identity")
    return out


def completed(sums: Shaped[Tensor, "z y x"]) -> Shaped[Tensor, "z y x-1"]:
    """Sums of an accumulator at ``x = 0 .. c``, with what the mates of its slices put there.

    Every entry at k stands for its conjugate at -k: that matters for the plane ``x = 0``, whose halves are each other's
    mates, and for ``x = 1``, whose mate is stored at ``x = -1``.
    """
    mate = sums[..., :2].flip(0, 1, 2).conj()
    return torch.cat([sums[..., 1:3] + mate, sums[..., 3:]], dim=-1)


def volume_from_accumulator(
    acc: Accumulator, regularisation: Float[Tensor, " shells"] | Float[Tensor, ""] | float = 0.0
) -> Float[Tensor, "d d d"]:
    """Map by regularised least squares from inserted slices: ``numerator / (weight + regularisation)``, transformed.

    Parameters
    ----------
    acc
        From :func:`insert_slices`.
    regularisation
        Added to the weights (same units): a number, or one value for each shell ``|k|`` in Fourier pixels (the last one
        serves beyond). Grid points with no weight and no regularisation are zero.

    Returns
    -------
    (D, D, D) real map, band-limited to the accumulator's radius.
    """
    transform = uncropped(_quotient(acc, regularisation)[0], acc.oversampling * acc.box)
    return _over_window(central(fourier_to_volume(transform, acc.oversampling * acc.box), acc.box), acc.oversampling)


def back_projected(acc: Accumulator) -> Float[Tensor, "d d d"]:
    """Adjoint of slicing: ``2 Re <slice(v), u> = <v, back_projected(u inserted)>`` over the stored half plane, for all maps v.

    Exact where reads stay below the grid's Nyquist frequency, so up to a pixel from the images' own.
    """
    side = acc.oversampling * acc.box
    wide = fourier_to_volume(uncropped(completed(acc.numerator), side), side) * float(side**3)
    return _over_window(central(wide, acc.box), acc.oversampling)


def _quotient(acc: Accumulator, regularisation: Tensor | float) -> tuple[Tensor, Tensor]:
    """``numerator / weight`` at the points of :func:`completed`, and the regularised weight; both 0 where images do not reach."""
    weight = torch.where(inside_ball(acc), completed(acc.weight) + on_grid(regularisation, acc), 0.0)
    ratio = completed(acc.numerator) / torch.where(weight > 0, weight, 1.0)
    return torch.where(weight > 0, ratio, 0.0), weight


def misfit(
    volume: Float[Tensor, "d d d"], acc: Accumulator, regularisation: Float[Tensor, " shells"] | float = 0.0
) -> Float[Tensor, ""]:
    """The least-squares objective of the sums at a map, 0 at its minimum over the grid and 1 at an empty map; differentiable.

    ``J(v) = sum_k weight |U|^2 - 2 Re(conj(numerator) U)`` over the whole oversampled grid, with the regularised weight and U the transform
    of the map *times* the transform of the B-spline (inserting blurs by the kernel what slicing a map *over* it makes good), is
    ``sum_k weight |U - numerator / weight|^2`` less a constant; this is its share of ``J(0) - min J``. Its minimum over U is
    :func:`volume_from_accumulator` before that is cut to the box.
    """
    best, weight = _quotient(acc, regularisation)
    c = weight.shape[-1] - 1
    blurred = volume * spline_window(acc.box, acc.oversampling * acc.box, volume)
    transform = _half_grid(blurred, acc.oversampling, c)[..., 1:]
    twice = torch.full((c + 1,), 2.0, device=weight.device)  # a point at x > 0 stands for its mate too
    twice[0] = 1.0
    size, off = ((twice * weight * torch.view_as_real(u).square().sum(-1)).sum() for u in (best, transform - best))
    return off / size


def _norm(acc: Accumulator) -> Float[Tensor, "z y x"]:
    """``|k|`` in grid points at ``x = 0 .. c``."""
    c = acc.weight.shape[-1] - 2
    full = torch.arange(-c, c + 1, device=acc.weight.device, dtype=acc.weight.dtype)
    return (full[:, None, None] ** 2 + full[None, :, None] ** 2 + full[None, None, c:] ** 2).sqrt()


def on_grid(
    spectrum: Float[Tensor, " shells"] | Float[Tensor, ""] | float, acc: Accumulator
) -> Float[Tensor, "z y x"] | Float[Tensor, ""]:
    """A number, or one value for each shell ``|k|`` in Fourier pixels (the last one serves beyond), at the points of :func:`completed`."""
    values = torch.as_tensor(spectrum, device=acc.weight.device, dtype=acc.weight.dtype)
    if not values.ndim:
        return values
    return values[(_norm(acc) / acc.oversampling).round().to(torch.int64).clamp(max=len(values) - 1)]


def inside_ball(acc: Accumulator) -> Bool[Tensor, "z y x"]:
    """Which points of :func:`completed` are within the accumulator's radius and below Nyquist."""
    norm = _norm(acc)
    return (norm <= acc.radius * acc.oversampling) & (2 * norm < acc.oversampling * acc.box)


def uncropped(values: Shaped[Tensor, "z y x"], side: int) -> Shaped[Tensor, "s s h"]:
    """Values at the points of :func:`completed` in the layout of a 3-D rfft of ``side``, zero elsewhere and at Nyquist."""
    c = values.shape[-1] - 1
    inner = min(c, (side - 1) // 2)
    out = values.new_zeros(side, side, side // 2 + 1)
    axis = torch.arange(-inner, inner + 1, device=values.device)
    rows = axis % side
    out[rows[:, None], rows[None, :], : inner + 1] = values[c + axis[:, None], c + axis[None, :], : inner + 1]
    return out


def central(volume: Float[Tensor, "s s s"], box: int) -> Float[Tensor, "d d d"]:
    """The ``box`` central voxels a side."""
    start = volume.shape[-1] // 2 - box // 2
    part = slice(start, start + box)
    return volume[part, part, part]
