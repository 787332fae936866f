"""Map and density of views from the moments of images, without poses (papers/003 section 4.2 and 5.2).

* **volume**: spherical harmonics times spherical Bessel functions in a ball, or a sum of Gaussians (``methods/moment_maps.py``).
* **poses**: a density over view directions, softmax on a HEALPix grid of one number per direction or of spherical harmonics; in-plane
  rotations uniform.
* **objective**: squared mismatch of first and second moment (eq. 30), each entry over the power of its two rings (so that inner rings, where
  nearly all power is, do not decide alone), and a penalty on negative density of the map.

Changed from the paper: L-BFGS on coefficients in place of networks; the second moment in blocks, one per angular order, which uniform in-plane
rotation makes exact; several random starts, radii marched outwards. What two moments cannot tell (other maps have nearly the same ones) is
left to a prior: the family of maps, its penalty, and the starts.
"""

import math
from dataclasses import astuple, dataclass, replace
from itertools import pairwise

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.groups.so3 import healpix_grid, in_plane_count
from cryorbit.methods.moment_maps import BallMaps, MapFamily, MixtureMaps
from cryorbit.physics.ctf import ctf
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.image_moments import (
    SHIFTED,
    Blur,
    ImageMoments,
    ImageMomentSums,
    check_shifts,
    moments_of_slices,
    relative_errors,
)
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.third_moments import ThirdMoments, third_of_slices
from cryorbit.training.dataset import ParticleSource
from cryorbit.training.equalise import background_spectrum, background_window
from cryorbit.types import CTFParams
from cryorbit.volumes.ball import real_harmonics

_BLOCK = 1000  # images in memory at once
_TOLERANCE = 1e-12  # of L-BFGS: moments are met to 1e-5 where they can be

Found = tuple[Float[Tensor, " n"], Float[Tensor, " l"], float]  # numbers of a map, of a density, the objective


@dataclass(frozen=True)
class MomentsConfig:
    """Settings of the inversion.

    Attributes
    ----------
    rings
        Fourier pixels to match at last; 0: as many as the moments have.
    degree
        Largest degree of the spherical harmonics.
    order
        HEALPix order of the grid of view directions.
    starts, kept
        Random starts, and how many of them are followed beyond the first rings.
    iterations
        Of L-BFGS for each set of rings.
    positivity
        Weight of the penalty on negative density.
    floor
        Smallest power of a ring in the weights, over the largest.
    margin
        Fourier pixels beyond the rings that functions of the map reach. With 0 even a true map has moments that are off in the last ring, with
        2 by a tenth or less of that.
    third
        Weight of the relative squared mismatch of third moments, where they are given.
    gaussians
        The map is a sum of so many Gaussians; 0: any map in a ball, to which ``degree``, ``positivity`` and ``margin`` apply.
    view_degree
        Largest degree of the spherical harmonics of the density's logarithm; 0: one number per direction.
    tolerance
        Entries weigh one over their variance plus the square of what a map's prediction may be off by, this share of the root of the power of
        each of their rings. 0: one over the powers alone, as in eq. 30.
    """

    rings: int = 0
    degree: int = 10
    order: int = 2
    starts: int = 5
    kept: int = 2
    iterations: int = 80
    positivity: float = 3.0
    floor: float = 1e-3
    margin: int = 0
    third: float = 10.0
    gaussians: int = 0
    view_degree: int = 0
    tolerance: float = 0.0


@dataclass(frozen=True)
class MomentMap:
    """A map (D, D, D) float64 with its density over ``rotations`` (V, 3, 3), the final objective and relative errors of both moments."""

    volume: Float[Tensor, "d d d"]
    density: Float[Tensor, " v"]
    rotations: Float[Tensor, "v 3 3"]
    objective: float
    errors: tuple[float, float]


def particle_moments(
    particles: ParticleSource, rings: int, *, mask_diameter: float, shift_sigma: float = 0.0
) -> ImageMoments:
    """Moments of a particle stack in one pass, a block of images in memory at a time; noise is measured around the particles.

    Parameters
    ----------
    particles
        Particles with their CTF, centred but for ``shift_sigma``; bright protein.
    rings
        Fourier pixels of the images' box that are looked at.
    mask_diameter
        Particle diameter in angstrom: pixels within it count, those outside are background.
    shift_sigma
        Standard deviation in angstrom of each coordinate of the particles' shifts, which an inversion reckons with.
    """
    own, sigma = 0.5 * mask_diameter / particles.pixel_size, shift_sigma / particles.pixel_size
    basis = PolarBasis(particles.box, rings, min(own, particles.box / 2))
    check_shifts(sigma, particles.box)
    if not len(particles):
        raise DataError("DATA423", "no particles to measure moments of")
    radius = own + SHIFTED * sigma
    wide = replace(basis, radius=min(radius, particles.box / 2))
    window, whole = background_window(particles.box, radius), fourier_disk(particles.box)
    blocks = torch.arange(len(particles)).split(_BLOCK)
    spectrum, total = torch.zeros(int(whole.shell.max()) + 1, dtype=torch.float64), None
    for block in blocks:
        images = torch.from_numpy(particles.read(block.numpy()))
        if not bool((fine := images.isfinite().all(dim=(1, 2))).all()):
            raise DataError(
                "DATA419", f"image {int(block[~fine][0]) + 1} holds values that are not finite", "leave it out"
            )
        background = (images * window).sum(dim=(1, 2)) / window.sum()
        images = images - background[:, None, None]
        spectrum += len(block) / len(particles) * background_spectrum(images, window, whole).double()
        sums = ImageMomentSums.of(wide, images, 1.0, _ring_ctf(particles, block, wide))
        total = sums if total is None else total + sums
    assert total is not None
    spectrum[0] = spectrum[1]  # shell 0 of a background without its mean says nothing
    found = total.debiased(spectrum)
    return replace(found, shift_sigma_px=sigma, particle_radius_px=basis.radius)


def _ring_ctf(particles: ParticleSource, block: Int[Tensor, " b"], basis: PolarBasis) -> Float[Tensor, "b k"] | None:
    """The CTF on each ring, mean over eight directions."""
    if particles.ctf is None:
        return None
    params = CTFParams.of(particles.ctf)[block]
    angle = math.pi / 8 * torch.arange(8, dtype=torch.float64)
    ring = torch.arange(basis.rings + 1, dtype=torch.float64) / (basis.box * particles.pixel_size)
    points = ring[:, None, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return ctf(params, points.reshape(-1, 2)).view(len(block), -1, 8).mean(dim=2).float()


def view_directions(order: int) -> Float[Tensor, "v 3 3"]:
    """One rotation for each HEALPix direction: third rows all over the sphere, some in-plane angle."""
    count = in_plane_count(order)
    return healpix_grid(order).view(-1, count, 3, 3)[:, 0].double()


class MomentFit:
    """The objective at given rings, for L-BFGS.

    Parameters
    ----------
    moments
        To be matched.
    config
        Settings.
    rings
        How many of them to match.
    third
        To be matched as well; of all rings.
    """

    def __init__(
        self, moments: ImageMoments, config: MomentsConfig, rings: int, third: ThirdMoments | None = None
    ) -> None:
        self.third = third
        self.moments, self.config = moments.within(rings), config
        self.rotations = view_directions(config.order)
        polar = self.moments.centred_basis
        self.maps: MapFamily = (
            MixtureMaps(polar, self.rotations, config.gaussians)
            if config.gaussians
            else BallMaps(polar, self.rotations, config.degree, config.margin)
        )
        self.harmonics = (
            torch.from_numpy(real_harmonics(config.view_degree, self.rotations[:, 2].numpy())).float()
            if config.view_degree
            else torch.eye(len(self.rotations))
        )
        sigma = self.moments.shift_sigma_px
        outer = self.moments.basis.orders
        self.blur = Blur(polar, sigma, outer=outer) if sigma or outer != polar.orders else None
        self.weights = self._weights()
        self.target = (self.moments.first.to(torch.complex64), self.moments.second.to(torch.complex64))

    def _weights(self) -> tuple[Float[Tensor, " k"], Float[Tensor, "m k k"]]:
        """Of the squared mismatch of each entry of both moments; orders m > 0 count twice, for m and -m."""
        power, c = self.moments.power.clamp(min=0), self.config
        level = power + c.floor * power.max()
        first, second = level, (level[:, None] * level).expand_as(self.moments.second.real)
        if c.tolerance:
            if self.moments.variance is None:
                raise DataError(
                    "DATA417", "these moments do not know their errors", "set tolerance to 0, or give them as summed"
                )
            first, second = (
                c.tolerance**2 * a + b for a, b in zip((first, second), self.moments.variance, strict=True)
            )
        second = 2 / second
        second[0] *= 0.5
        return (1 / first).float(), second.float()

    @property
    def uniform(self) -> Float[Tensor, " l"]:
        """Views of a uniform density."""
        return torch.zeros(self.harmonics.shape[1])

    def density(self, views: Float[Tensor, " l"]) -> Float[Tensor, " v"]:
        """Probability of each direction."""
        return torch.softmax(self.harmonics @ views, 0)

    def predicted(self, parameters: Float[Tensor, " n"], views: Float[Tensor, " l"]) -> ImageMoments:
        """Moments of a map and a density, of particles shifted as those of the images."""
        return self._blurred(moments_of_slices(self.maps.slices(parameters), self.density(views), self.maps.polar))

    def _blurred(self, moments: ImageMoments) -> ImageMoments:
        if self.blur is None:
            return moments
        return ImageMoments(*self.blur(moments.first, moments.second), self.moments.basis)

    def scaled(self, parameters: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The same map, of the right power."""
        power = self.predicted(parameters, self.uniform).power.sum() / self.moments.power.sum().clamp_min(1e-30)
        return self.maps.scaled(parameters, float(power.clamp_min(1e-30)) ** -0.5)

    def objective(self, parameters: Float[Tensor, " n"], views: Float[Tensor, " l"]) -> Float[Tensor, ""]:
        """Weighted squared mismatch and penalty; about 1 for an empty map."""
        slices, density = self.maps.slices(parameters), self.density(views)
        found = self._blurred(moments_of_slices(slices, density, self.maps.polar))
        (first, second), (weigh_first, weigh_second) = self.target, self.weights
        off_second = (weigh_second * (found.second - second).abs().square()).sum()
        off_first = (weigh_first * (found.first - first).abs().square()).sum()
        whole = (weigh_second * second.abs().square()).sum() + (weigh_first * first.abs().square()).sum()
        mismatch = (off_second + off_first) / whole + self.config.positivity * self.maps.penalty(parameters)
        if self.third is None:
            return mismatch
        given = self.third.values.to(torch.complex64)
        off_third = (third_of_slices(self.third.filters, slices, density).values - given).abs().square().sum()
        return mismatch + self.config.third * off_third / given.abs().square().sum()

    def minimised(self, parameters: Float[Tensor, " n"], views: Float[Tensor, " l"], iterations: int) -> Found:
        """The same after L-BFGS, and the objective there."""
        n = len(parameters)
        scale = float(parameters.norm()) / n**0.5

        def loss(packed: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            x = torch.from_numpy(packed).float().requires_grad_()
            value = self.objective(scale * x[:n], x[n:])
            (gradient,) = torch.autograd.grad(value, x)
            return float(value.detach()), gradient.double().numpy()

        start = torch.cat([parameters / scale, views]).double().numpy()
        options = {
            "maxiter": iterations,
            "maxfun": 2 * iterations,
            "maxcor": 20,
            "ftol": _TOLERANCE,
            "gtol": _TOLERANCE,
        }
        found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        x = torch.from_numpy(found.x).float()
        return scale * x[:n], x[n:], float(found.fun)

    def as_map(self, found: Found) -> MomentMap:
        """What was found, on its grid."""
        parameters, views, objective = found
        first, second = relative_errors(self.predicted(parameters, views), self.moments)
        errors = (float(first), float(second))
        return MomentMap(self.maps.volume(parameters), self.density(views), self.rotations, objective, errors)


def _check(moments: ImageMoments, config: MomentsConfig, rings: int, third: ThirdMoments | None) -> None:
    """CONF115 settings out of range, DATA409 moments without a signal, DATA416, 418 shifts."""
    most = len(moments.first) - 1
    counts = 1 <= config.kept <= config.starts and min(config.degree, config.iterations) >= 1
    sound = all(0 <= x < math.inf for x in astuple(config))
    directions = 12 * 4**config.order  # of HEALPix
    if not (2 <= rings <= most and counts and sound and 1 <= (config.view_degree + 1) ** 2 <= directions):
        raise ConfigError(
            "CONF115",
            f"{config} cannot invert moments on {most} rings",
            f"rings 2 to {most} (0: all), degree and iterations from 1, kept from 1 to starts, none negative or infinite, views of at most "
            f"{directions} harmonics, the number of directions",
        )
    moments.check()
    if third and moments.shift_sigma_px:
        raise DataError("DATA418", "third moments of shifted images", "centre the images before summing, or do without")


def invert_moments(
    moments: ImageMoments, config: MomentsConfig, generator: torch.Generator, third: ThirdMoments | None = None
) -> MomentMap:
    """The map whose moments are closest to ``moments``.

    With third moments those that were kept are followed on among all maps in a ball (whatever the family before, with a margin of at least
    two Fourier pixels), until these moments are met too.

    Parameters
    ----------
    moments
        Debiased; shifts that the images have are reckoned with.
    config
        Settings.
    generator
        Draws the starts.
    third
        Debiased, of the same rings.

    Raises
    ------
    ConfigError
        CONF115 settings out of range.
    DataError
        DATA409 moments without a signal; DATA417 ``tolerance`` for moments without variances; DATA418 third moments of shifted images.
    """
    rings = config.rings or len(moments.first) - 1
    _check(moments, config, rings, third)
    stages = sorted({max(2, rings // 2), max(2, round(0.8 * rings)), rings})
    fit = MomentFit(moments, config, stages[0])
    found = sorted((_random_start(fit, generator) for _ in range(config.starts)), key=lambda x: x[2])
    found = found[: config.kept]
    for before, stage in pairwise(stages):
        wider = MomentFit(moments, config, stage)
        found = [wider.minimised(wider.maps.carried(a, before), views, config.iterations) for a, views, _ in found]
        fit = wider
    if third is not None:
        in_ball = replace(config, gaussians=0, margin=max(2, config.margin))
        wider = MomentFit(moments, in_ball, rings, third)
        basis = BallMaps(wider.moments.basis, wider.rotations, in_ball.degree, in_ball.margin).basis
        starts = [(basis.nearest(fit.maps.volume(a)).float(), views) for a, views, _ in found]
        found = [wider.minimised(wider.scaled(a), views, config.iterations) for a, views in starts]
        fit = wider
    return fit.as_map(min(found, key=lambda x: x[2]))


def invert_from(
    moments: ImageMoments, config: MomentsConfig, parameters: Float[Tensor, " n"], third: ThirdMoments | None = None
) -> MomentMap:
    """The map near a given one whose moments are closest to ``moments``; all rings at once: the inner ones alone lead a good start astray.

    Parameters
    ----------
    moments
        Debiased; shifts that the images have are reckoned with.
    config
        Settings; ``rings``, ``starts`` and ``kept`` are not looked at.
    parameters
        As many as the family of maps takes (``methods/moment_maps.py``), of any scale.
    third
        Debiased, of the same rings; to be matched as well.

    Raises
    ------
    ConfigError
        CONF115 settings out of range; CONF119 not a start of this family.
    DataError
        DATA409 moments without a signal; DATA417 ``tolerance`` for moments without variances; DATA418 third moments of shifted images.
    """
    rings = len(moments.first) - 1
    _check(moments, config, rings, third)
    fit = MomentFit(moments, config, rings, third)
    expected, given = len(fit.maps.start(torch.Generator())), parameters.detach().float()
    if given.shape != (expected,) or not bool(given.isfinite().all()) or not bool(given.any()):
        raise ConfigError(
            "CONF119",
            f"a start of shape {tuple(given.shape)} for maps that take {expected} numbers, finite and not all 0",
            "make it in the same family",
        )
    return fit.as_map(fit.minimised(fit.scaled(given), fit.uniform, config.iterations))


def _random_start(fit: MomentFit, generator: torch.Generator) -> Found:
    """The best map near a random one of the right power, its density near uniform at first."""
    parameters = fit.scaled(fit.maps.start(generator))
    views = 0.1 * torch.randn(len(fit.uniform), generator=generator)
    return fit.minimised(parameters, views, fit.config.iterations)
