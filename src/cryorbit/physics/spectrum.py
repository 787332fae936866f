"""Radial means over Fourier disks and slicing grids, and growing an accumulator to a larger radius."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.physics.fourier import FourierDisk
from cryorbit.physics.slicing import Accumulator, SlicingGrid, completed, half_width


def shell_mean(values: Float[Tensor, " p"], disk: FourierDisk, shells: int) -> Float[Tensor, " shells"]:
    """Mean of ``values`` on ``disk`` over each shell 0 .. shells - 1 of the whole plane; 0 where the disk has no pixel."""
    total, count = (disk.shell_sums(x, shells) for x in (values, torch.ones_like(values)))
    return total / count.clamp_min(1)


def followed_noise(
    noise: Float[Tensor, " shells"],
    first: Float[Tensor, " shells"],
    residual: Float[Tensor, " p"],
    disk: FourierDisk,
    radius: int,
    rate: float,
) -> Float[Tensor, " shells"]:
    """Noise per shell after one step of EM: a share ``rate`` of it replaced by the mean ``residual`` power, up to ``radius``.

    Never below 1e-4 of ``first``, the images' own power: a residual of zero would make every posterior a delta.
    """
    fresh = torch.maximum(shell_mean(residual, disk, len(noise)), 1e-4 * first)
    inside = torch.arange(len(noise), device=noise.device) <= radius
    return torch.where(inside, (1 - rate) * noise + rate * fresh, noise)


def _shell_planes(c: int, oversampling: int, shells: int, device: torch.device) -> Iterator[Int[Tensor, " points"]]:
    """Shell (``|k|`` in Fourier pixels, rounded; at most ``shells``) of the points ``x = 1 .. c`` of each plane ``z = 0 .. c``."""
    axis = torch.arange(-c, c + 1, dtype=torch.float32, device=device) / oversampling
    flat = axis[:, None].square() + axis[c + 1 :].square()
    for z in axis[c:]:
        yield (flat + z * z).sqrt().round().to(torch.int64).clamp_(max=shells).flatten()


@lru_cache
def _shell_counts(c: int, oversampling: int, shells: int) -> Float[Tensor, " n"]:
    every = _shell_planes(c, oversampling, shells, torch.device("cpu"))
    planes = torch.stack([torch.bincount(s, minlength=shells + 1) for s in every])
    return 2 * planes.sum(dim=0).double() - planes[0]


def _radial_mean(values: Float[Tensor, "z y x"], oversampling: int, shells: int) -> Float[Tensor, " shells"]:
    """Mean over the points of each shell but those at ``x = 0``, each of which is there twice; plane by plane, as shells of a whole grid are
    a large array.
    """
    c = values.shape[-1] - 1
    total = torch.zeros(shells + 1, dtype=torch.float64, device=values.device)
    for z, shell in enumerate(_shell_planes(c, oversampling, shells, values.device)):
        plane = values[c, :, 1:] if z == 0 else values[c + z, :, 1:] + values[c - z, :, 1:]
        total += torch.bincount(shell, plane.flatten(), shells + 1)
    return (total / _shell_counts(c, oversampling, shells).to(total).clamp_min(1)).to(values.dtype)[:shells]


def mean_weight(accumulator: Accumulator, shells: int) -> Float[Tensor, " shells"]:
    """Mean inserted weight per shell 0 .. shells - 1; the last covered shell's value beyond the radius."""
    mean = _radial_mean(completed(accumulator.weight), accumulator.oversampling, shells)
    last = min(int(accumulator.radius), shells - 1)
    return torch.cat([mean[: last + 1], mean[last].expand(shells - last - 1)])


def power_spectrum(grid: SlicingGrid, shells: int) -> Float[Tensor, " shells"]:
    """Mean ``|V|^2`` per shell 0 .. shells - 1 of a map's transform."""
    return _radial_mean(grid.data[..., 1:].abs().square(), grid.oversampling, shells)


def resized(accumulator: Accumulator, radius: float) -> Accumulator:
    """The same sums on a grid for ``radius``: zero padded where larger, cropped where smaller."""
    old = half_width(accumulator.radius, accumulator.oversampling)
    grow = half_width(radius, accumulator.oversampling) - old
    if grow == 0:
        return accumulator
    pad = [0, grow, grow, grow, grow, grow]
    return Accumulator(
        torch.nn.functional.pad(accumulator.numerator, pad),
        torch.nn.functional.pad(accumulator.weight, pad),
        accumulator.box,
        accumulator.oversampling,
        float(radius),
    )
