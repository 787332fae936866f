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
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.errors import DataError
from cryorbit.physics.polar import PolarBasis

_LEAST_RING = 0.1  # of the last ring, that shifts leave: beyond, moments are those of the damping more than of images
_LEAST_BLUR = 1e-3  # square of the share of a moment below which it is not divided by it
_ANGLES = 64
_SMALLEST, _LARGEST = 1e-14, 1e16  # total power that single precision can weigh
SHIFTED = 3.0
"""Standard deviations as far as shifts are taken to reach."""


def ring_power(second: Complex[Tensor, "*batch m k k"]) -> Float[Tensor, "*batch k"]:
    """Mean ``|F|^2`` on each ring from the blocks ``E c_m(k) c_m(k')*``, m >= 0, of images or of noise."""
    diagonal = second.diagonal(dim1=-2, dim2=-1).real
    return diagonal[..., 0, :] + 2 * diagonal[..., 1:, :].sum(dim=-2)


def check_shifts(shift_sigma_px: float, box: int) -> None:
    """Refuse what is no standard deviation of shifts of images of ``box`` pixels: DATA416."""
    if not 0 <= shift_sigma_px <= box / (2 * SHIFTED):
        raise DataError(
            "DATA416",
            f"shifts of sigma {shift_sigma_px:g} px in images of {box} px, expected 0 to {box / (2 * SHIFTED):g}",
            "give the standard deviation of each coordinate, or cut out larger images",
        )


def check_centring(shift_sigma_px: float, basis: PolarBasis) -> None:
    """Refuse shifts that leave less than a tenth of the last ring, from which moments cannot be centred: DATA416."""
    reach = math.sqrt(-math.log(_LEAST_RING) / 2) * basis.box / math.pi
    if shift_sigma_px * basis.rings > reach:
        raise DataError(
            "DATA416",
            f"shifts of sigma {shift_sigma_px:g} px leave less than {_LEAST_RING:g} of ring {basis.rings}",
            f"look at fewer rings ({reach / shift_sigma_px:.0f}), or centre the particles better",
        )


class Blur:
    """What shifts make of the moments of centred particles, or that undone.

    Parameters
    ----------
    basis
        Rings and orders of what comes in.
    shift_sigma_px
        Standard deviation of each coordinate of the shifts.
    outer
        Largest order of what goes out.
    undone
        Divide. Angles at which a shift leaves less than a few per cent of a moment are damped, not restored (Wiener).
    """

    def __init__(self, basis: PolarBasis, shift_sigma_px: float, *, outer: int, undone: bool = False) -> None:
        def gain(square: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
            blur = torch.exp(-2 * (math.pi * shift_sigma_px / basis.box) ** 2 * square)
            return blur * (1 + _LEAST_BLUR) / (blur.square() + _LEAST_BLUR) if undone else blur

        k = torch.arange(basis.rings + 1, dtype=torch.float64)
        count = max(_ANGLES, 2 * (basis.orders + outer + 1))  # as many as the product has orders
        angle = 2 * math.pi / count * torch.arange(count, dtype=torch.float64)
        apart = k[:, None] ** 2 + k**2 - 2 * k[:, None] * k * angle.cos()[:, None, None]
        self.first, self.second = gain(k.square()), gain(apart)

        def waves(most: int) -> Complex[Tensor, "m n"]:
            phase = torch.arange(most + 1, dtype=torch.float64)[:, None] * angle
            return torch.polar(torch.ones_like(phase), phase)

        self.to_angle, self.to_order = 2 * waves(basis.orders).mT, waves(outer).conj() / count
        self.to_angle[:, 0] = 1  # the others count for -m too, which is the conjugate

    def __call__(
        self, first: Complex[Tensor, " k"], second: Complex[Tensor, "m k k"]
    ) -> tuple[Complex[Tensor, " k"], Complex[Tensor, "n k k"]]:
        """Both moments; differentiable."""
        around = (self.to_angle.to(second) @ second.flatten(1)).real * self.second.flatten(1).to(second.real)
        blurred = self.to_order.to(second) @ around.to(second)
        return first * self.first.to(first.real), blurred.unflatten(1, second.shape[1:])


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
        Of the entries of both, ``E |estimate - moment|^2``, at a known spectrum of the noise; None where exact or not asked for.
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
        if self.particle_radius_px is None:
            return self.basis
        return replace(self.basis, radius=self.particle_radius_px)

    def check(self) -> None:
        """Refuse moments from which nothing can be learnt.

        Raises
        ------
        DataError
            DATA409 no signal, or values that are not finite; DATA416 shifts of no standard deviation.
        """
        check_shifts(self.shift_sigma_px, self.basis.box)
        power, variance = float(self.power.sum()), self.variance or ()
        finite = all(bool(x.isfinite().all()) for x in (self.first, self.second, *variance))
        if not (finite and _SMALLEST < power < _LARGEST):
            raise DataError(
                "DATA409",
                f"moments with a total power of {power:g}"
                + ("" if finite else ", some not finite,")
                + " show no particle",
                "sum more images, of finite values and a spread of about 1, or look at them",
            )

    def within(self, rings: int) -> "ImageMoments":
        """Rings 0 to ``rings``; DATA422 where there are fewer."""
        if rings > self.basis.rings:
            raise DataError(
                "DATA422", f"moments on {self.basis.rings} rings, {rings} asked for", "measure them on more rings"
            )
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
            DATA416 shifts of no standard deviation, or of one that leaves less than a tenth of the last ring.
        """
        self.check()
        check_centring(self.shift_sigma_px, self.basis)
        basis = self.centred_basis
        undo = Blur(self.basis, self.shift_sigma_px, outer=basis.orders, undone=True)
        return ImageMoments(*undo(self.first, self.second), basis)


def added(a: Any, b: Any, *other: str) -> dict[str, Any]:
    """Sums of the fields of two dataclasses, but of the ``other`` ones."""
    return {f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(a) if f.name not in other}


@dataclass(frozen=True)
class Spread:
    """Sums over images that say how far the estimates of moments are off, however CTFs and noise differ among images.

    Of an entry an image brings ``z = h h' c c'*``, of which ``g M + n N`` is expected, with ``g = h^2 h'^2``, ``n = h h'`` times the strength
    of its noise, M the moment and N that of noise; what it brings beyond that is error.

    Attributes
    ----------
    square, signal, noise
        Of ``|z|^2``, ``g z`` and ``n z``, each (M + 1, K + 1, K + 1).
    weights
        (3, K + 1, K + 1) of ``g^2``, ``n^2`` and ``g n``.
    first
        (2, K + 1) of ``|z|^2`` and ``h^2 z`` for ``z = h c_0``.
    """

    square: Float[Tensor, "m k k"]
    signal: Complex[Tensor, "m k k"]
    noise: Complex[Tensor, "m k k"]
    weights: Float[Tensor, "3 k k"]
    first: Complex[Tensor, "2 k"]

    @staticmethod
    def of(z: Complex[Tensor, "m k b"], h: Float[Tensor, "b k"], strength: Float[Tensor, " b"]) -> "Spread":
        """Of one block of images: ``z`` their coefficients times ``h``."""
        h, s = h.mT, strength.sqrt()

        def crossed(x: Tensor) -> Tensor:
            """Sum over images of each pair of rings, in double precision."""
            return (x @ x.mH).to(torch.promote_types(x.dtype, torch.float64))

        return Spread(
            crossed(z.abs().square()),
            crossed(z * h**2),
            crossed(z * (s * h)),
            torch.stack([crossed(x) for x in (h**4, s**2 * h**2, s * h**3)]),
            torch.stack([z[0].abs().square().to(z), z[0] * h**2]).sum(dim=-1).to(torch.complex128),
        )

    def __add__(self, other: "Spread") -> "Spread":
        return Spread(**added(self, other))

    def variance(
        self, moments: ImageMoments, noise: Complex[Tensor, "m k k"], weights: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, "m k k"]]:
        """Of the estimates ``moments``, at these moments of noise, from sums of these weights."""
        first, second = moments.first, moments.second
        g, n, both = self.weights
        one = (
            self.first[0].real - 2 * (first.conj() * self.first[1]).real + first.abs().square() * weights[1].diagonal()
        )
        two = self.square - 2 * (second.conj() * self.signal + noise.conj() * self.noise).real
        two = two + g * second.abs().square() + n * noise.abs().square() + 2 * both * (second.conj() * noise).real
        return one.clamp_min(0) / weights[0].square(), two.clamp_min(0) / weights[1].square()


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
    spread
        What the errors of both follow from; None where they were not asked for.
    count
        Images.
    """

    basis: PolarBasis
    first: Complex[Tensor, " k"]
    second: Complex[Tensor, "m k k"]
    weight_first: Float[Tensor, " k"]
    weight_second: Float[Tensor, "k k"]
    noise: Float[Tensor, "k k"]
    spread: Spread | None
    count: int

    @staticmethod
    def of(
        basis: PolarBasis,
        images: Float[Tensor, "b d d"],
        noise: Float[Tensor, " b"] | float,
        ctf: Float[Tensor, "b k"] | None = None,
        *,
        errors: bool = False,
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
        errors
            Whether to sum what the variance of each moment follows from: half as long again.
        """
        c = basis.coefficients(images)
        h = torch.ones(len(images), basis.rings + 1, device=images.device) if ctf is None else ctf.to(images.device)
        variance = torch.as_tensor(noise, dtype=h.dtype, device=h.device).expand(len(images))
        by_order = (c * h[:, None]).permute(1, 2, 0)
        square = h.square().double()
        return ImageMomentSums(
            basis,
            (h * c[:, 0]).sum(dim=0).to(torch.complex128),
            (by_order @ by_order.mH).to(torch.complex128),
            square.sum(dim=0),
            square.mT @ square,
            (h * variance[:, None]).double().mT @ h.double(),
            Spread.of(by_order, h, variance) if errors else None,
            len(images),
        )

    def __add__(self, other: "ImageMomentSums") -> "ImageMomentSums":
        if self.basis != other.basis:
            raise DataError(
                "DATA406", f"moments on {self.basis} and {other.basis} cannot be added", "measure both on one basis"
            )
        spread = self.spread + other.spread if self.spread and other.spread else None
        return replace(self, spread=spread, **added(self, other, "basis", "spread"))

    def debiased(self, spectrum: Float[Tensor, " s"], background: Float[Tensor, "d d"] | None = None) -> ImageMoments:
        """Unbiased estimates of the moments of noise-free images without CTF, and the variance of each, where it was asked for.

        Parameters
        ----------
        spectrum
            Of the noise, variance per pixel and shell (``physics/noise.py``); one entry for white noise.
        background
            (D, D) window whose mean was taken off each image (:meth:`PolarBasis.noise`).

        Raises
        ------
        DataError
            DATA407 no image says anything of some ring.
        """
        if not self.count or not bool((self.weight_second > 0).all()):
            raise DataError(
                "DATA407",
                f"{self.count} images leave a ring of the moments without information",
                "sum images, of more than one defocus where they have a CTF",
            )
        noise = self.basis.noise(spectrum, background).to(self.noise.device)
        weights = (self.weight_first, self.weight_second)
        second = (self.second - self.noise * noise) / self.weight_second
        found = ImageMoments(self.first / self.weight_first, second, self.basis)
        if self.spread is None:
            return found
        first_variance, second_variance = self.spread.variance(found, noise, weights)
        fewer = self.count / (self.count - 1) if self.count > 1 else math.inf  # the moments are of the same images
        return replace(found, variance=(fewer * first_variance, fewer * second_variance))


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
