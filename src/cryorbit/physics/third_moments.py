"""Third moments of particle images whose in-plane rotation is uniform, through random filters.

In-plane rotations uniform, a third moment says ``E c_m(k) c_m'(k') c_(m+m')(k'')*``, the bispectrum of the angle (idea: Kam 1980). All
of its entries are too many; here an image is first seen through random real filters, ``y_m = sum_k w_m(k) h(k) c_m(k)``, one number for each
filter and order, h the image's CTF on the rings, and ``T(m, m') = E y_m y_m' y_(m+m')*`` is kept for each filter: random combinations of
all entries.

Noise adds ``E y_0`` times its own power: ``T(0, m)`` gains ``E y_0 N_m``, ``T(0, 0)`` three times that, all else nothing.

What CTFs and shifts do to third moments cannot be divided out of a few combinations, so a map's prediction goes through it (:class:`Seen`):

* **CTF**, taken to be round and independent of the view: of the CTFs of all images ``E h^2(k) h^2(k') h^2(k'')`` is kept, and a few
  gains ``g_r`` are found with ``sum_r g_r(k) g_r(k') g_r(k'')`` equal to it: the images might as well have had these. Six to twelve do for 1 to
  2.5 um of defocus at 11 angstrom; finding 24, for a wider range, takes some seconds.
* **shifts**, normal with sigma s in each coordinate: slices are shifted by a few lengths (Gauss-Laguerre quadrature of the square) in a few
  directions, which differ from view to view. As T does not know in-plane rotations, a slice is turned and then shifted along x.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from numpy.typing import NDArray
from scipy.special import jv
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.physics.image_moments import added
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.triples import mean_products, parts

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # of gains that stand in for all CTFs
_CLOSE = 3e-3  # relative error at which they do
_WORST = 0.03  # beyond, what is said of the outer rings is not true
_SAME_FILTERS = 1e-3  # of the weights: other processors round the power that they follow otherwise
_GOLDEN = 0.5 * (math.sqrt(5) - 1)
_LEAST_SPREAD = 1e-4  # of the mean square: images that are all the same have none


@dataclass(frozen=True)
class ThirdFilters:
    """Random filters on the rings and orders of ``basis``.

    Attributes
    ----------
    basis
        Rings ``0 .. K`` and orders ``0 .. M``.
    weights
        (J, M + 1, K + 1), real.
    orders
        Largest m and m'.
    """

    basis: PolarBasis
    weights: Float[Tensor, "j m k"]
    orders: int

    @staticmethod
    def random(
        basis: PolarBasis,
        count: int,
        orders: int,
        generator: torch.Generator,
        images: Float[Tensor, "b d d"],
        ctf: Float[Tensor, "b k"] | None = None,
        reaches: Sequence[int] = (),
    ) -> "ThirdFilters":
        """``count`` filters that weigh rings as ``images`` like those to come show them, noise and CTF and all; for each of ``reaches`` so many
        that look no further than that ring.

        Raises
        ------
        ConfigError
            CONF123 no filters, or no order beyond 0.
        DataError
            DATA424 no images, or images that are not finite or all zero.
        """
        if count < 1 or orders < 1:
            raise ConfigError("CONF123", f"{count} filters of orders up to {orders}", "ask for one or more of each")
        c = basis.coefficients(images)
        square = (c if ctf is None else c * ctf.to(c.real)[:, None]).abs().square().mean(dim=0)
        power = square[0] + 2 * square[1:].sum(dim=0)
        if not 0 < float(power.max()) < math.inf:
            raise DataError(
                "DATA424", f"{len(images)} images of power {float(power.max()):g}", "give some that show particles"
            )
        ring, reaches = torch.arange(basis.rings + 1), reaches or (basis.rings,)
        drawn = torch.cat(
            [torch.randn(count, basis.orders + 1, len(ring), generator=generator) * (ring <= last) for last in reaches]
        )
        weights = drawn * power.clamp_min(1e-6 * float(power.max())).rsqrt().to(drawn)
        return ThirdFilters(basis, weights, min(orders, basis.orders))

    @property
    def reach(self) -> int:
        """Largest order that is looked at."""
        return min(2 * self.orders, self.basis.orders)

    @property
    def last_rings(self) -> Int[Tensor, " j"]:
        """How far out each filter looks."""
        ring = torch.arange(self.basis.rings + 1)
        return torch.where(self.weights.abs().amax(dim=1) > 0, ring, 0).amax(dim=1)

    @cached_property
    def pairs(self) -> Int[Tensor, "p 2"]:
        """(m, m') with ``m <= m'`` whose sum is an order of the basis."""
        return torch.tensor(
            [(a, b) for a, part, _ in parts(self.orders, self.reach + 1) for b in range(part.start, part.stop)]
        )

    @property
    def by_order(self) -> Float[Tensor, "m j k"]:
        """Weights of the orders up to :attr:`reach`."""
        return self.weights[:, : self.reach + 1].transpose(0, 1)


@dataclass(frozen=True)
class ThirdMoments:
    """Noise-free ``values`` of images with CTFs.

    Attributes
    ----------
    filters
        What images were seen through.
    values
        (J, P) of ``T(m, m')`` for each filter and pair of orders.
    gains
        (R, K + 1) that stand in for ``h^2`` of the images; ones, of one row, where they have no CTF.
    spread
        (J, P) variance of the product of one image, noise and all: entries weigh one over it. By size alone ``T(0, 0)``, the least
        telling, would outweigh all others.
    gains_off
        Relative error of the third moment of these gains.
    """

    filters: ThirdFilters
    values: Complex[Tensor, "j p"]
    gains: Float[Tensor, "r k"]
    spread: Float[Tensor, "j p"]
    gains_off: float = 0.0

    def check(self) -> None:
        """Refuse values that are not finite, and gains that are not like the CTFs: DATA425."""
        spread = self.spread.float()  # as it weighs
        finite = all(bool(x.isfinite().all()) for x in (self.values, self.gains, self.filters.weights, 1 / spread))
        if not (finite and bool((0 < spread).all()) and self.gains_off < _WORST):
            raise DataError(
                "DATA425",
                f"{len(self.gains)} gains are {self.gains_off:.3f} off what CTFs do to third moments, at most {_WORST}"
                if finite
                else "third moments that are not finite, or whose spread is none or infinite",
                "sum images of finite values and a spread of about 1, and look at fewer rings where defocus varies much",
            )

    def within(self, rings: int) -> "ThirdMoments":
        """Rings 0 to ``rings``: what filters see that look that far, or, where none does, the furthest that look less far.

        Raises
        ------
        DataError
            DATA431 all look further.
        """
        last = self.filters.last_rings
        if not bool((last <= rings).any()):
            raise DataError(
                "DATA431",
                f"third moments through filters that look at {int(last.min())} rings and more, {rings} asked for",
                "measure them through filters of that reach as well",
            )
        chosen = last == last[last <= rings].max()
        basis = replace(self.filters.basis, rings=min(rings, self.filters.basis.rings))
        weights = self.filters.weights[chosen, : basis.orders + 1, : basis.rings + 1]
        inner = ThirdFilters(basis, weights, min(self.filters.orders, basis.orders))
        place = {tuple(pair): i for i, pair in enumerate(self.filters.pairs.tolist())}
        kept = [place[tuple(pair)] for pair in inner.pairs.tolist()]
        values, spread = (x[chosen][:, kept] for x in (self.values, self.spread))
        return ThirdMoments(inner, values, self.gains[:, : basis.rings + 1], spread, self.gains_off)

    def mismatch(self, found: Complex[Tensor, "j p"]) -> Float[Tensor, ""]:
        """Mean over entries of the squared error over the spread; differentiable."""
        return ((found - self.values.to(found)).abs().square() / self.spread.to(found.real)).mean()


@dataclass(frozen=True)
class ThirdSums:
    """Running sums over images; sums of parts of a set add up.

    Attributes
    ----------
    filters
        What images were seen through.
    products
        (J, P) sums of the products, complex128.
    squares
        (J, P) sums of their squares.
    biased
        (J, K + 1, K + 1) sums of ``y_0 h h'`` times the noise's strength.
    optics
        (K + 1, K + 1, K + 1) sums of ``h^2 h'^2 h''^2``.
    count
        Images.
    """

    filters: ThirdFilters
    products: Complex[Tensor, "j p"]
    squares: Float[Tensor, "j p"]
    biased: Float[Tensor, "j k k"]
    optics: Float[Tensor, "k k k"]
    count: int

    @staticmethod
    def of(
        filters: ThirdFilters,
        images: Float[Tensor, "b d d"],
        noise: Float[Tensor, " b"] | float,
        ctf: Float[Tensor, "b k"] | None = None,
    ) -> "ThirdSums":
        """Sums over one block of images.

        Parameters
        ----------
        filters
            What to see them through.
        images
            (B, D, D).
        noise
            Variance of each image's noise, in units of the spectrum given to :meth:`debiased`.
        ctf
            (B, K + 1) at the rings; None for none.
        """
        c, rings = filters.basis.coefficients(images), filters.basis.rings + 1
        h = (torch.ones(len(images), rings) if ctf is None else ctf).to(c.real)
        seen, w = (c * h[:, None])[:, : filters.reach + 1].permute(1, 2, 0), filters.by_order.to(h)
        re, im, even = w @ seen.real, w @ seen.imag, torch.ones_like(h[:, 0])
        power = re.square() + im.square()
        variance = torch.as_tensor(noise, dtype=torch.float64).expand(len(images))
        crossed = (h[:, :, None] * h[:, None]).flatten(1).double()
        first = re[0].double() * variance.to(h.device)
        square = h.square().double()
        return ThirdSums(
            filters,
            mean_products(re, im, even, filters.orders).to(torch.complex128),
            mean_products(power, 0 * power, even, filters.orders).real.double(),
            (first @ crossed).view(-1, rings, rings),
            (square.mT @ crossed.square()).view(rings, rings, rings),
            len(images),
        )

    def __add__(self, other: "ThirdSums") -> "ThirdSums":
        mine, others = self.filters, other.filters
        same = (
            mine.basis == others.basis and mine.orders == others.orders and mine.weights.shape == others.weights.shape
        )
        if not (same and torch.allclose(mine.weights, others.weights, rtol=_SAME_FILTERS)):
            raise DataError(
                "DATA408", "third moments seen through other filters cannot be added", "use the same filters"
            )
        return replace(self, **added(self, other, "filters"))

    def debiased(self, spectrum: Float[Tensor, " s"], background: Float[Tensor, "d d"] | None = None) -> "ThirdMoments":
        """Unbiased estimate for noise-free images.

        Parameters
        ----------
        spectrum
            Of the noise, variance per pixel and shell (``physics/noise.py``); one entry for white noise.
        background
            (D, D) window whose mean was taken off each image (:meth:`PolarBasis.noise`).

        Raises
        ------
        DataError
            DATA426 fewer than two images.
        """
        if self.count < 2:
            raise DataError(
                "DATA426",
                f"third moments of {self.count} images",
                "sum more: what one brings says nothing of the spread",
            )
        covariance = self.filters.basis.noise(spectrum, background).real.to(self.biased.device)
        a, b = self.filters.pairs.to(self.biased.device).unbind(1)
        w = self.filters.weights.to(covariance)
        bias = torch.einsum("jmk,mkl,jml,jkl->jm", w, covariance, w, self.biased)
        times = torch.where(b == 0, 3.0, 1.0) * (a == 0)
        gains, gains_off = stand_ins(self.optics / self.count)
        square = self.squares / self.count
        spread = (square - (self.products / self.count).abs().square()).clamp_min(_LEAST_SPREAD * square)
        values = (self.products - times * bias[:, b]) / self.count
        return ThirdMoments(self.filters, values, gains, spread, gains_off)


def stand_ins(optics: Float[Tensor, "k k k"]) -> tuple[Float[Tensor, "r k"], float]:
    """Gains (R, K + 1) with ``sum_r g_r g_r' g_r''`` near the given mean of ``h^2 h'^2 h''^2``, and the relative error that they leave.

    As few as leave less than 0.003, at most 24; without a CTF it is one, of ones. (A symmetric canonical decomposition, from random starts.)
    """
    generator, scale = torch.Generator().manual_seed(0), float(optics.max()) ** (1 / 3)
    optics, one = optics / max(scale, 1e-30) ** 3, torch.arange(len(optics))
    norm = optics.norm()
    typical = optics[one, one, one].clamp_min(0) ** (1 / 3)
    gains, off = typical[None], math.inf
    for count in _COUNTS:
        drawn = 2 * torch.rand(count, len(optics), generator=generator, dtype=torch.float64)
        found = (typical * drawn / count ** (1 / 3)).requires_grad_()
        steps = torch.optim.LBFGS(
            [found],
            max_iter=500,
            history_size=50,
            tolerance_grad=1e-12,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def loss(found: Tensor = found, steps: torch.optim.LBFGS = steps) -> Tensor:
            steps.zero_grad()
            wrong = torch.einsum("ra,rb,rc->abc", found, found, found) - optics
            value = (wrong.norm() / norm).square()
            value.backward()
            return value

        steps.step(loss)
        left = float(loss().detach().sqrt())
        if left < off:
            gains, off = found.detach(), left
        if off < _CLOSE:
            break
    return scale * gains, off


class Seen:
    """Third moments that a map's slices have when seen as the images were: through their CTFs, shifts and filters.

    Parameters
    ----------
    filters
        Of the images' rings.
    gains
        (R, K + 1) in place of the squares of their CTFs (:class:`ThirdMoments`).
    polar
        Of the slices: centred particles, as many rings.
    shift_sigma_px
        Standard deviation of each coordinate of the shifts.
    """

    def __init__(
        self, filters: ThirdFilters, gains: Float[Tensor, "r k"], polar: PolarBasis, shift_sigma_px: float = 0.0
    ) -> None:
        self.filters, reach, weights = filters, filters.reach, filters.by_order
        self.weights = (weights[:, :, None] * gains.to(weights)).flatten(1, 2)  # (m, (j, r), k)
        lengths, self.chances = _lengths(shift_sigma_px, 2 * math.pi * shift_sigma_px * polar.rings / polar.box)
        ring, self.orders = np.arange(polar.rings + 1), torch.arange(-polar.orders, polar.orders + 1)
        apart = np.arange(reach + 1)[:, None] - self.orders.numpy()
        bend = jv(apart, 2 * np.pi / polar.box * ring[:, None, None, None] * lengths[:, None, None])
        shift = bend * np.array([1, -1j, -1, 1j])[apart % 4]  # along x
        self.shift = torch.from_numpy(shift).to(torch.complex64)  # (k, q, order out, order in)
        self.sign = torch.tensor([(-1.0) ** m for m in range(polar.orders, 0, -1)])

    def __call__(self, coefficients: Complex[Tensor, "v m k"], density: Float[Tensor, " v"]) -> Complex[Tensor, "j p"]:
        """From directions of probability ``density``; differentiable in both."""
        negative = self.sign.to(coefficients)[:, None] * coefficients[:, 1:].flip(1).conj()
        both = torch.cat([negative, coefficients], dim=1).permute(2, 1, 0)
        phase = self._turns(len(density)).to(both)
        turned = (both[:, :, None] * phase).flatten(2)  # (k, order in, (a, v))
        rings, points, orders, _ = self.shift.shape
        shifted = (self.shift.flatten(1, 2).to(both) @ turned).view(rings, points, orders, -1)
        ordered = shifted.permute(2, 0, 1, 3).flatten(2)  # (m, k, (q, a, v))
        weights, count = self.weights.to(ordered.real), len(self.filters.weights)
        re, im = ((weights @ x).view(orders, count, -1) for x in (ordered.real, ordered.imag))  # (m, j, (r, q, a, v))
        each = density.repeat(phase.shape[1]) / phase.shape[1]
        share = (self.chances.to(density)[:, None] * each).flatten()
        return mean_products(re, im, share.repeat(re.shape[2] // len(share)), self.filters.orders)

    def _turns(self, views: int) -> Complex[Tensor, "m a v"]:
        """What turns each slice so that a shift along x is one in any of a few directions, other ones for each view: what one is short of
        the views beside it make up, where there are any.
        """
        points = len(self.chances)
        count = 1 if points == 1 else 2 * points + 1
        offset = torch.arange(views, dtype=torch.float64) * _GOLDEN % 1
        angle = 2 * math.pi / count * (torch.arange(count)[:, None] + offset)
        phase = self.orders[:, None, None] * angle
        return torch.polar(torch.ones_like(phase), phase)


def _lengths(sigma: float, spread: float) -> tuple[NDArray[np.float64], Float[Tensor, " q"]]:
    """Of shifts that stand in for normal ones of ``sigma``, and their chances; ``spread``: of the phase at the last ring, radian."""
    if not sigma:
        return np.zeros(1), torch.ones(1)
    squares, chances = np.polynomial.laguerre.laggauss(math.ceil(spread) + 1)
    return sigma * np.sqrt(2 * squares), torch.from_numpy(chances)
