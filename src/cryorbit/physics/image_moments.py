"""First and second moments of particle images whose in-plane rotation is uniform (papers/003 section 3.2), in one pass.

Averaged over in-plane rotations, ``M1(k) = E c_0(k)`` and the second moment has one block for each angular order,
``M2_m(k, k') = E c_m(k) c_m(k')*`` (``physics/polar.py``): for 63 pixels a few thousand numbers, not 3969 x 3969.

Changed from the paper, which leaves both to later work: images carry a CTF (its mean over directions on each ring; what its beats carry beyond
the circle is lost), and the noise may be coloured and of different strength in each image. Each entry is the least-squares estimate over
images, ``M2 = sum h_k h_k' (c c* - noise) / sum (h_k h_k')^2`` with h the CTF at the rings. Without CTF it is the paper's estimator
(eq. 32).

Shifts that are normal, isotropic and independent of the view, of sigma ``s`` pixels in each coordinate, multiply ``E F(k) F(k')*`` by
``exp(-2 pi^2 s^2 |k - k'|^2 / D^2)`` (k, k' here vectors of Fourier space), which depends on the angle between k and k' alone: moments of
particles that are not centred are those of centred ones times that. :class:`Blur` does this to what a map predicts;
:meth:`ImageMoments.centred` takes it out of what was measured.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.physics.polar import PolarBasis

_LEAST_RING = 0.1  # of the last ring, that shifts leave: beyond, moments are those of the damping more than of images
_LEAST_BLUR = 1e-3  # square of the share of a moment below which it is not divided by it
_ANGLES = 64


def ring_power(second: Complex[Tensor, "*batch m k k"]) -> Float[Tensor, "*batch k"]:
    """Mean ``|F|^2`` on each ring from the blocks ``E c_m(k) c_m(k')*``, m >= 0, of images or of noise."""
    diagonal = second.diagonal(dim1=-2, dim2=-1).real
    return diagonal[..., 0, :] + 2 * diagonal[..., 1:, :].sum(dim=-2)


def check_shifts(basis: PolarBasis, shift_sigma_px: float) -> None:
    """Refuse shifts whose effect cannot be taken out of moments on ``basis``.

    Raises
    ------
    DataError
        DATA416 no standard deviation, or one that leaves less than a tenth of the last ring.
    """
    if not 0 <= shift_sigma_px < math.inf:
        raise DataError("DATA416", f"shifts of sigma {shift_sigma_px:g} px, expected 0 or more")
    reach = math.sqrt(-math.log(_LEAST_RING) / 2) * basis.box / math.pi
    if shift_sigma_px * basis.rings > reach:
        raise DataError(
            "DATA416",
            f"shifts of sigma {shift_sigma_px:g} px leave less than {_LEAST_RING:g} of ring {basis.rings}",
            f"look at {math.floor(reach / shift_sigma_px)} rings, or centre the particles better",
        )


class Blur:
    """What shifts make of the moments of centred particles, or that undone.

    Parameters
    ----------
    basis
        Rings.
    shift_sigma_px
        Standard deviation of each coordinate of the shifts.
    inner, outer
        Largest order of what comes in and of what goes out.
    undone
        Divide. Angles at which a shift leaves less than a few per cent of a moment are damped, not restored (Wiener).
    """

    def __init__(
        self, basis: PolarBasis, shift_sigma_px: float, *, inner: int, outer: int, undone: bool = False
    ) -> None:
        def gain(square: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
            blur = torch.exp(-2 * (math.pi * shift_sigma_px / basis.box) ** 2 * square)
            return blur * (1 + _LEAST_BLUR) / (blur.square() + _LEAST_BLUR) if undone else blur

        k = torch.arange(basis.rings + 1, dtype=torch.float64)
        count = max(_ANGLES, 4 * (inner + outer + 1))  # more than the products have orders
        angle = 2 * math.pi / count * torch.arange(count, dtype=torch.float64)
        apart = k[:, None, None] ** 2 + k[:, None] ** 2 - 2 * k[:, None, None] * k[:, None] * angle.cos()
        orders = torch.arange(inner + outer + 1, dtype=torch.float64)
        by_order = torch.einsum("kln,mn->mkl", gain(apart), (orders[:, None] * angle).cos()) / count
        ins, outs = torch.arange(inner + 1), torch.arange(outer + 1)[:, None]
        minus, plus = by_order[(outs - ins).abs()], by_order[outs + ins]  # order -m is the conjugate of order m
        plus[:, 0] = 0
        self.first, self.real, self.imaginary = gain(k.square()), minus + plus, minus - plus

    def __call__(
        self, first: Complex[Tensor, " k"], second: Complex[Tensor, "m k k"]
    ) -> tuple[Complex[Tensor, " k"], Complex[Tensor, "n k k"]]:
        """Both moments; differentiable."""
        parts = (
            torch.einsum("nmkl,mkl->nkl", turn.to(part), part)
            for turn, part in ((self.real, second.real), (self.imaginary, second.imag))
        )
        return first * self.first.to(first.real), torch.complex(*parts)


@dataclass(frozen=True)
class ImageMoments:
    """Noise-free moments of images.

    Attributes
    ----------
    first, second
        (K + 1,) and (M + 1, K + 1, K + 1), Hermitian in its last axes; of ``basis``.
    basis
        Rings and orders.
    variance
        Of the entries of both, ``E |estimate - moment|^2``, from their spread over the images (that CTFs differ counts as spread); None where
        they are exact.
    shift_sigma_px
        Standard deviation of each coordinate of shifts that the images still have, in pixels.
    particle_radius_px
        Of the circle within which centred particles lie, where that of the basis is wider so that shifts do not cut them off.
    """

    first: Complex[Tensor, " k"]
    second: Complex[Tensor, "m k k"]
    basis: PolarBasis
    variance: tuple[Float[Tensor, " k"], Float[Tensor, "m k k"]] | None = None
    shift_sigma_px: float = 0.0
    particle_radius_px: float | None = None

    @property
    def power(self) -> Float[Tensor, " k"]:
        """Mean ``|F|^2`` on each ring: all orders, m and -m."""
        return ring_power(self.second)

    @property
    def centred_basis(self) -> PolarBasis:
        """Of the same particles without shifts: a smaller circle, fewer orders."""
        return replace(self.basis, radius=self.particle_radius_px or self.basis.radius)

    def within(self, rings: int) -> "ImageMoments":
        """Rings 0 to ``rings``."""
        inner = slice(0, rings + 1)
        basis = replace(self.basis, rings=rings)
        orders = slice(0, basis.orders + 1)
        variance = self.variance and (self.variance[0][inner], self.variance[1][orders, inner, inner])
        return replace(
            self, first=self.first[inner], second=self.second[orders, inner, inner], basis=basis, variance=variance
        )

    def centred(self) -> "ImageMoments":
        """Moments that the same particles would have if they were centred; their variance is not carried over.

        Raises
        ------
        DataError
            As :func:`check_shifts`.
        """
        check_shifts(self.basis, self.shift_sigma_px)
        basis, orders = self.centred_basis, self.basis.orders
        undo = Blur(self.basis, self.shift_sigma_px, inner=orders, outer=basis.orders, undone=True)
        return ImageMoments(*undo(self.first, self.second), basis)


@dataclass(frozen=True)
class ImageMomentSums:
    """Running sums over images; ``a + b`` is the sums of both sets, so parts of a set may be summed in any process and added.

    Attributes
    ----------
    basis
        Rings and orders.
    first, second
        (K + 1,) sums of ``h c_0`` and (M + 1, K + 1, K + 1) of ``h h' c_m c_m'*``, double precision.
    weight_first, weight_second
        (K + 1,) sums of ``h^2`` and (K + 1, K + 1) of ``h^2 h'^2``.
    noise
        (K + 1, K + 1) sums of ``h h'`` times the noise's strength.
    spread_first, spread_second
        Sums of the squared magnitudes of what ``first`` and ``second`` sum.
    count
        Images.
    """

    basis: PolarBasis
    first: Complex[Tensor, " k"]
    second: Complex[Tensor, "m k k"]
    weight_first: Float[Tensor, " k"]
    weight_second: Float[Tensor, "k k"]
    noise: Float[Tensor, "k k"]
    spread_first: Float[Tensor, " k"]
    spread_second: Float[Tensor, "m k k"]
    count: int

    @staticmethod
    def of(
        basis: PolarBasis,
        images: Float[Tensor, "b d d"],
        noise: Float[Tensor, " b"] | float,
        ctf: Float[Tensor, "b k"] | None = None,
    ) -> "ImageMomentSums":
        """Sums over one block of images.

        Parameters
        ----------
        basis
            Rings and orders.
        images
            (B, D, D), centred.
        noise
            Variance of each image's noise, in units of the spectrum given to :meth:`debiased`: one number, or (B,).
        ctf
            (B, K + 1) at the rings; None for none.
        """
        c = basis.coefficients(images)
        h = torch.ones(len(images), basis.rings + 1, device=images.device) if ctf is None else ctf.to(images.device)
        variance = torch.as_tensor(noise, dtype=h.dtype, device=h.device).expand(len(images))
        by_order = (c * h[:, None]).permute(1, 2, 0)
        square, power = h.square().double(), by_order.abs().square()
        return ImageMomentSums(
            basis,
            (h * c[:, 0]).sum(dim=0).to(torch.complex128),
            (by_order @ by_order.mH).to(torch.complex128),
            square.sum(dim=0),
            square.mT @ square,
            (h * variance[:, None]).double().mT @ h.double(),
            power[0].sum(dim=1).double(),
            (power @ power.mT).double(),
            len(images),
        )

    def __add__(self, other: "ImageMomentSums") -> "ImageMomentSums":
        if self.basis != other.basis:
            raise DataError("DATA406", f"moments on {self.basis} and {other.basis} cannot be added")
        return ImageMomentSums(
            self.basis,
            self.first + other.first,
            self.second + other.second,
            self.weight_first + other.weight_first,
            self.weight_second + other.weight_second,
            self.noise + other.noise,
            self.spread_first + other.spread_first,
            self.spread_second + other.spread_second,
            self.count + other.count,
        )

    def debiased(self, spectrum: Float[Tensor, " s"]) -> ImageMoments:
        """Unbiased estimates of the moments of noise-free images without CTF, and the variance of each.

        Parameters
        ----------
        spectrum
            Of the noise, variance per pixel and shell (``physics/noise.py``); one entry for white noise.

        Raises
        ------
        DataError
            DATA407 no image says anything of some ring.
        """
        if not self.count or not bool((self.weight_second > 0).all()):
            raise DataError("DATA407", f"{self.count} images leave a ring of the moments without information")
        second = self.second - self.noise * self.basis.noise(spectrum).to(self.noise.device)

        def variance(spread: Tensor, total: Tensor, weight: Tensor) -> Tensor:
            return (spread - total.abs().square() / self.count).clamp_min(0) / weight.square()

        return ImageMoments(
            self.first / self.weight_first,
            second / self.weight_second,
            self.basis,
            (
                variance(self.spread_first, self.first, self.weight_first),
                variance(self.spread_second, self.second, self.weight_second),
            ),
        )


def moments_of_slices(
    coefficients: Complex[Tensor, "v m k"], density: Float[Tensor, " v"], basis: PolarBasis
) -> ImageMoments:
    """Moments of slices ``c_m(k)`` (V, M + 1, K + 1) seen from directions of probability ``density``; differentiable in both."""
    weighed = coefficients * density[:, None, None]
    by_order = coefficients.permute(1, 2, 0)
    return ImageMoments(weighed[:, 0].sum(dim=0), weighed.permute(1, 2, 0) @ by_order.mH, basis)


def relative_errors(found: ImageMoments, given: ImageMoments) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Relative Frobenius errors of first and second moment (papers/003 eq. 23); orders m > 0 count twice, for m and -m."""

    def norm(x: Tensor) -> Tensor:
        squares = x.abs().square().sum(dim=(1, 2))
        return (squares[0] + 2 * squares[1:].sum()).sqrt()

    first = (found.first - given.first).norm() / given.first.norm()
    return first, norm(found.second - given.second) / norm(given.second)
