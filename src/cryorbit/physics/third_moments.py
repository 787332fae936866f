"""Third moments of particle images whose in-plane rotation is uniform, through random filters.

In-plane rotations uniform, a third moment says ``E c_m(k) c_m'(k') c_(m+m')(k'')*``, the bispectrum of the angle (idea: Kam 1980). All
of its entries are too many; here an image is first seen through random real filters, ``y_m = sum_k w_m(k) c_m(k)``, one number for each
filter and order, and ``T(m, m') = E y_m y_m' y_(m+m')*`` is kept for each filter: random combinations of all entries.

Noise adds ``E y_0`` times its own power: ``T(0, m)`` gains ``E y_0 N_m``, ``T(0, 0)`` three times that, all else nothing.
Images must be centred and without CTF (shifts blur these too, and :meth:`ImageMoments.centred` has no like here).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.physics.polar import PolarBasis


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
        basis: PolarBasis, power: Float[Tensor, " k"], count: int, orders: int, generator: torch.Generator
    ) -> "ThirdFilters":
        """``count`` filters that expect ``power`` (K + 1,), of signal and noise, on each ring."""
        drawn = torch.randn(count, basis.orders + 1, basis.rings + 1, generator=generator)
        return ThirdFilters(basis, drawn * power.float().clamp_min(1e-30).rsqrt(), min(orders, basis.orders))

    @cached_property
    def pairs(self) -> Int[Tensor, "p 2"]:
        """(m, m') with ``m <= m'`` whose sum is an order of the basis."""
        reach = range(self.orders + 1)
        return torch.tensor([(a, b) for a in reach for b in reach if a <= b and a + b <= self.basis.orders])

    def products(self, coefficients: Complex[Tensor, "b m k"]) -> Complex[Tensor, "b j p"]:
        """``y_m y_m' y_(m+m')*`` of each image and filter; differentiable."""
        y = torch.einsum("bmk,jmk->bjm", coefficients, self.weights.to(coefficients))
        a, b = self.pairs.unbind(1)
        return y[:, :, a] * y[:, :, b] * y[:, :, a + b].conj()


@dataclass(frozen=True)
class ThirdMoments:
    """Noise-free ``values`` (J, P) of ``T(m, m')`` for each filter and pair of orders."""

    filters: ThirdFilters
    values: Complex[Tensor, "j p"]


@dataclass(frozen=True)
class ThirdSums:
    """Running sums over images; sums of parts of a set add up.

    Attributes
    ----------
    filters
        What images were seen through.
    products
        (J, P) sums of the products, complex128.
    biased
        (J,) sums of ``y_0`` times the noise's strength.
    count
        Images.
    """

    filters: ThirdFilters
    products: Complex[Tensor, "j p"]
    biased: Float[Tensor, " j"]
    count: int

    @staticmethod
    def of(filters: ThirdFilters, images: Float[Tensor, "b d d"], noise: Float[Tensor, " b"] | float) -> "ThirdSums":
        """Sums over one block of images (B, D, D); ``noise``: variance of each, in units of the spectrum given to :meth:`debiased`."""
        c = filters.basis.coefficients(images)
        first = (c[:, 0].real @ filters.weights[:, 0].mT).double()
        variance = torch.as_tensor(noise, dtype=torch.float64).expand(len(images))
        products = filters.products(c).to(torch.complex128).sum(dim=0)
        return ThirdSums(filters, products, variance @ first, len(images))

    def __add__(self, other: "ThirdSums") -> "ThirdSums":
        if self.filters is not other.filters:
            raise DataError(
                "DATA408", "third moments seen through other filters cannot be added", "use the same filters"
            )
        return ThirdSums(
            self.filters,
            self.products + other.products,
            self.biased + other.biased,
            self.count + other.count,
        )

    def debiased(self, spectrum: Float[Tensor, " s"]) -> "ThirdMoments":
        """Unbiased estimate for noise-free images.

        Parameters
        ----------
        spectrum
            Of the noise, variance per pixel and shell (``physics/noise.py``); one entry for white noise.
        """
        covariance = self.filters.basis.noise(spectrum)
        w = self.filters.weights.to(covariance)
        power = torch.einsum("jmk,mkl,jml->jm", w, covariance, w).real
        a, b = self.filters.pairs.unbind(1)
        times = torch.where(b == 0, 3.0, 1.0) * (a == 0)
        return ThirdMoments(self.filters, (self.products - self.biased[:, None] * times * power[:, b]) / self.count)


def third_of_slices(
    filters: ThirdFilters, coefficients: Complex[Tensor, "v m k"], density: Float[Tensor, " v"]
) -> ThirdMoments:
    """Those of slices (V, M + 1, K + 1) seen from directions of probability ``density``; differentiable in both."""
    products = filters.products(coefficients)
    return ThirdMoments(filters, torch.einsum("v,vjp->jp", density.to(products), products))
