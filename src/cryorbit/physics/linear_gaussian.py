"""The exact posterior of a map whose poses are known: linear images, Gaussian noise, Gaussian prior (papers/002 section 5.1 without the
variational detour).

Images ``y = c V(q) + n`` at points q of Fourier space, ``E|n|^2 = N``, give the map's transform near k the precision ``rho / N``, rho the
summed ``c^2`` per unit of Fourier volume: ``o^3`` times the inserted weight W on a grid of o points per Fourier pixel. With a prior of
variance ``t`` the posterior at a grid point has the variance ``1 / (o^3 W / N + 1 / t)``. Of that grid a map of side D keeps what lies
inside its box: every coefficient of the map is a sum of the points around it under the transform of the box, so its variance is their
mean under the square of that kernel, taken by one transform and a triangle window (the box's autocorrelation). Where views are even this is
the inverse of the precision's diagonal, which is the variance of the mean-field Gaussian of papers/002; at the rim of a missing cone it is
larger, and right (docs/methods/variational.md has the numbers).

Coefficients are those of the map's unnormalised transform; variances are complex, ``E|V - mean|^2`` of real and imaginary part together.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cryorbit.physics.fourier import (
    FourierDisk,
    fourier_to_volume,
    frequencies,
    friedel_weight,
    shell_index,
    volume_to_fourier,
)
from cryorbit.physics.slicing import (
    Accumulator,
    completed,
    half_width,
    inside_ball,
    on_grid,
    uncropped,
    volume_from_accumulator,
)
from cryorbit.physics.spectrum import mean_weight

_NO_HOLE = 1e-3  # of a shell's mean weight: what keeps the least-squares map finite
_UPDATES = 30
_SURE = 0.1  # relative error of a posterior variance that the prior may cause before shells are pooled
_POOLED = 16  # of the box, one part: as many shells on either side, at most, are pooled
_SEEN = 0.5  # of a coefficient, below which what is left of it is of its neighbours and says nothing of the prior


def ball(box: int, radius: float, device: torch.device | str = "cpu") -> Float[Tensor, "d d h"]:
    """1 at the coefficients of a map's rfft that images reach, ``|k| <= radius`` and below Nyquist, 0 elsewhere."""
    full = frequencies(box, device).float()
    norm2 = full[:, None, None] ** 2 + full[:, None] ** 2 + full[: box // 2 + 1] ** 2
    return ((norm2 <= radius**2) & (4 * norm2 < box**2)).float()


def _box_mean(values: Float[Tensor, "z y x"], acc: Accumulator) -> Float[Tensor, "d d h"]:
    """Mean of real, even grid values around each coefficient of the map, under the squared transform of the box."""
    box, o = acc.box, acc.oversampling
    side = o * box
    density = fourier_to_volume(uncropped(values, side).to(values.dtype.to_complex()), side)
    axis = torch.arange(side, device=values.device, dtype=values.dtype) - side // 2
    triangle = (1 - axis.abs() / box).clamp_min(0)
    density = density * (triangle[:, None] * triangle)[..., None] * triangle
    # Of the grid's points every o-th is a coefficient of the map: the transform of the density folded into the box.
    folded = density.reshape(o, box, o, box, o, box).sum(dim=(0, 2, 4))
    return volume_to_fourier(folded.roll([box // 2 - side // 2] * 3, dims=(0, 1, 2))).real


def _mean_inside(values: Float[Tensor, "z y x"], acc: Accumulator) -> Float[Tensor, "d d h"]:
    """:func:`_box_mean` over the points that images reach; 0 at coefficients they do not."""
    share = _share_inside(acc.box, acc.oversampling, acc.radius, values.device, values.dtype)
    return _sum_inside(values, acc) / share


@lru_cache(maxsize=2)
def _share_inside(
    box: int, oversampling: int, radius: float, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "d d h"]:
    """How much of the kernel of each coefficient lies within the radius."""
    c = half_width(radius, oversampling)
    points = torch.zeros(2 * c + 1, 2 * c + 1, c + 2, device=device, dtype=dtype)
    empty = Accumulator(points.to(dtype.to_complex()), points, box, oversampling, radius)
    return _box_mean(inside_ball(empty).to(dtype), empty).clamp_min(1e-3)


def _sum_inside(values: Float[Tensor, "z y x"], acc: Accumulator) -> Float[Tensor, "d d h"]:
    """:func:`_box_mean` with nothing at points that images do not reach."""
    kept = ball(acc.box, acc.radius, values.device).to(values.dtype)
    return kept * _box_mean(values * inside_ball(acc), acc)


def posterior_variance(
    acc: Accumulator, noise: Float[Tensor, " shells"], prior: Float[Tensor, " shells"]
) -> Float[Tensor, "d d h"]:
    """Variance of every coefficient of the map given posed images.

    Parameters
    ----------
    acc
        Inserted images and ``CTF^2``, not divided by the noise.
    noise, prior
        ``E|n|^2`` of a Fourier pixel and ``E|V|^2`` of a coefficient, per shell of the map (the last entry serves beyond).

    Returns
    -------
    (D, D, D // 2 + 1) in rfft layout; 0 beyond the accumulator's radius, where the map has no coefficients.
    """
    weight = completed(acc.weight).clamp_min(0)
    precision = acc.oversampling**3 * weight / on_grid(noise, acc) + 1 / on_grid(prior, acc)
    shell = shell_index(acc.box, precision.device).clamp(max=len(prior) - 1)
    return torch.minimum(_mean_inside(1 / precision, acc), prior.to(precision)[shell])


def posterior_mean(
    acc: Accumulator, noise: Float[Tensor, " shells"], prior: Float[Tensor, " shells"]
) -> Float[Tensor, "d d d"]:
    """Mean of the same posterior, a real map: the Wiener-filtered back-projection. Parameters as for :func:`posterior_variance`."""
    return volume_from_accumulator(acc, noise / (acc.oversampling**3 * prior))


def information(acc: Accumulator) -> Float[Tensor, "d d h"]:
    """Inserted ``CTF^2`` per coefficient of the map: the precision the images give it, times their noise. Where views are missing, 0."""
    return acc.oversampling**3 * _mean_inside(completed(acc.weight).clamp_min(0), acc)


def slice_variance(
    variance: Float[Tensor, "d d h"], rotations: Float[Tensor, "b 3 3"], disk: FourierDisk
) -> Float[Tensor, "b p"]:
    """Variance of the pixels of a map's central slices: that of the nearest coefficient (it hardly changes from one to the next).

    Parameters
    ----------
    variance
        From :func:`posterior_variance`.
    rotations, disk
        As for :func:`~cryorbit.physics.slicing.slice_grid`.
    """
    box = variance.shape[0]
    points = torch.stack([disk.kx, disk.ky], dim=1).to(rotations) @ rotations[:, :2]  # R^T (kx, ky, 0), xyz
    points = torch.where(points[..., :1] < 0, -points, points)

    def read(x: Int[Tensor, "b p"], y: Int[Tensor, "b p"], z: Int[Tensor, "b p"]) -> Float[Tensor, "b p"]:
        return variance[z % box, y % box, x]

    nearest, inner = (read(*(x.to(torch.int64).unbind(dim=-1))) for x in (points.round(), points.trunc()))
    return torch.where(nearest > 0, nearest, inner)  # at the rim the nearest may be one beyond what images reach


def corrected_mean(
    mean: Float[Tensor, "d d d"],
    variance: Float[Tensor, "d d h"],
    residual: Accumulator,
    noise: Float[Tensor, " shells"],
    prior: Float[Tensor, " shells"],
) -> Float[Tensor, "d d d"]:
    """A posterior mean after one step of iterative refinement, ``mean + covariance (S* (y - S mean) / N - mean / prior)``.

    The back-projection takes slices for evenly spread, which near the origin they are not: :func:`posterior_mean` is off by up to a few per
    cent of the amplitude in the first shells, many times its standard deviation there. One step leaves a tenth of that.

    Parameters
    ----------
    mean
        (D, D, D) first answer.
    variance
        From :func:`posterior_variance`.
    residual
        The images less their predictions from ``mean``, inserted like the images.
    noise, prior
        As for :func:`posterior_variance`.
    """
    shell = shell_index(residual.box, mean.device).clamp(max=len(prior) - 1)
    shrunk = variance / prior[shell]
    pull = fourier_to_volume(volume_to_fourier(mean) * shrunk, residual.box)
    return mean + posterior_mean(residual, noise, prior) - pull


@dataclass(frozen=True)
class LeastSquares:
    """What the images alone say of each coefficient that they show well.

    Attributes
    ----------
    power
        (V,) ``|V|^2`` of the least-squares map.
    seen
        (V,) how much of the true coefficient is in it, squared.
    error
        (V,) its variance from noise, over the noise of its shell.
    shell, weight
        (V,) which shell, and how many coefficients of the whole transform it stands for.
    shells, whole
        How many shells the map has, and the last that images reach with all of its width; beyond it the prior is that shell's.
    used
        (D, D, D // 2 + 1) which coefficients these are.
    """

    power: Float[Tensor, " v"]
    seen: Float[Tensor, " v"]
    error: Float[Tensor, " v"]
    shell: Int[Tensor, " v"]
    weight: Float[Tensor, " v"]
    shells: int
    whole: int
    used: Bool[Tensor, "d d h"]

    def sums(self, values: Float[Tensor, " v"]) -> Float[Tensor, " shells"]:
        """Over each shell of the whole transform."""
        zero = torch.zeros(self.shells, dtype=torch.float64, device=values.device)
        return zero.index_add(0, self.shell, values * self.weight)


def least_squares(acc: Accumulator, used: Bool[Tensor, "d d h"] | None = None) -> LeastSquares:
    """The least-squares map from inserted images, coefficient by coefficient: those ``used``, or those the images show well."""
    shells = acc.box // 2 + 1
    weight = completed(acc.weight).clamp_min(0)
    floor = _NO_HOLE * mean_weight(acc, shells)
    total = weight + on_grid(floor, acc)
    seen = _mean_inside(weight / total, acc)
    error = _sum_inside(weight / total.square(), acc) / acc.oversampling**3
    power = volume_to_fourier(volume_from_accumulator(acc, floor)).abs().square()
    index = shell_index(acc.box, weight.device)
    used = (seen > _SEEN) & (index < shells) if used is None else used
    number = friedel_weight(acc.box, seen).expand_as(seen)[used]
    power, h2, error = (x[used].double() for x in (power, seen.square(), error))
    return LeastSquares(power, h2, error, index[used], number.double(), shells, math.ceil(acc.radius - 0.5) - 1, used)


def calibrated(
    found: LeastSquares, first: Accumulator, second: Accumulator, power: Float[Tensor, " shells"]
) -> LeastSquares:
    """Least squares whose ``error`` is what noise really does, as two halves of the residuals show it.

    The closed form of :func:`least_squares` takes the inserted weight for even between neighbouring grid points. It is not, and less so
    with few views or at the rim of a missing cone, where the form is too high by tens of per cent. The difference of two halves over
    their joint weight holds no signal, and noise as the least-squares map has it: in each shell the form is scaled to it, coefficients
    weighed as they are in the likelihood of a prior near nothing.

    Parameters
    ----------
    found
        From :func:`least_squares` of all images.
    first, second
        Residuals of every other image, inserted like the images.
    power
        Mean power of the same residuals per shell.
    """
    half = least_squares(
        Accumulator(
            first.numerator - second.numerator,
            first.weight + second.weight,
            first.box,
            first.oversampling,
            first.radius,
        ),
        found.used,
    )
    expected = found.error * power.double()[found.shell]
    measured, formula = (_pooled(found.sums(x), _widest(found)) for x in (half.power / expected.square(), 1 / expected))
    factor = torch.where(formula > 0, measured / formula.clamp_min(1e-300), 1.0)
    return replace(found, error=found.error * factor[found.shell])


def _widest(found: LeastSquares) -> int:
    return max(1, 2 * found.shells // _POOLED)


def _pooled(sums: Float[Tensor, " shells"], width: int) -> Float[Tensor, " shells"]:
    """Sums over each shell and its neighbours, ``width`` on either side; shell 0, the images' background, stays alone."""
    window = torch.nn.functional.pad(sums[1:], (width, width)).unfold(0, 2 * width + 1, 1).sum(dim=1)
    return torch.cat([sums[:1], window])


def learned_prior(found: LeastSquares, noise: Float[Tensor, " shells"]) -> Float[Tensor, " shells"]:
    """Power spectrum of the map by empirical Bayes: the prior variance per shell that makes the images most probable, without half-sets.

    A least-squares coefficient has the variance ``h^2 t + s``, h how much of it the images determine and s what their noise makes of it;
    t maximises their likelihood over each shell (Fisher scoring, to the fixed point of expectation-maximisation on t). Where one shell does
    not tell t well enough for the posterior's variance, which is t where noise dominates, its neighbours are taken with it. It is never
    below its standard error: a shell in which nothing is seen is not known to be empty.

    Parameters
    ----------
    found
        From :func:`least_squares`.
    noise
        As for :func:`posterior_variance`.
    """
    h2, error, shell = found.seen, found.error * noise.double()[found.shell], found.shell
    count = found.sums(torch.ones_like(h2))
    prior = found.sums(found.power / h2) / count.clamp_min(1)
    for _ in range(_UPDATES):
        variance = h2 * prior[shell] + error
        matters = found.sums(error / variance) / count.clamp_min(1)
        top = found.sums(h2 * (found.power - error) / variance.square())
        bottom = found.sums((h2 / variance).square()).clamp_min(1e-300)
        prior, open_ = torch.zeros_like(prior), torch.ones_like(prior, dtype=torch.bool)
        for width in range(_widest(found) + 1):
            information = _pooled(bottom, width)
            value, own = _pooled(top, width) / information, (2 / information).sqrt()
            prior = torch.where(open_, torch.maximum(value, own), prior)  # no less than its own standard error
            open_ = open_ & (own * matters > _SURE * prior)
    whole = min(found.whole, int(torch.nonzero(count > 0).max()))
    for empty in (
        torch.nonzero(count == 0).flatten().tolist()
    ):  # a shell that no coefficient shows well is like its neighbour
        prior[empty] = prior[max(empty - 1, 0)]
    prior[whole + 1 :] = prior[whole]
    return prior.to(noise)
