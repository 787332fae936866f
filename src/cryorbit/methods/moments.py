"""Map and density of views from the moments of images, without poses (papers/003 section 4.2 and 5.2).

* **volume**: spherical harmonics times spherical Bessel functions in a ball (``volumes/ball.py``).
* **poses**: a density over view directions, softmax on a HEALPix grid; in-plane rotations uniform.
* **objective**: squared mismatch of first and second moment (eq. 30), each entry over the power of its two rings (so that inner rings, where
  nearly all power is, do not decide alone), and a penalty on negative density of the map.

Changed from the paper: L-BFGS on coefficients in place of networks; the second moment in blocks, one per angular order, which uniform in-plane
rotation makes exact; several random starts, radii marched outwards. What two moments cannot tell (another map may have the same ones: in
tests, starts at the truth and random starts end with like mismatch and unlike maps) is left to the penalty, the ball and the starts.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.groups.so3 import healpix_grid, in_plane_count
from cryorbit.physics.ctf import ctf
from cryorbit.physics.fourier import fourier_disk
from cryorbit.physics.image_moments import ImageMoments, ImageMomentSums, moments_of_slices, relative_errors
from cryorbit.physics.polar import PolarBasis
from cryorbit.training.dataset import ParticleSource
from cryorbit.training.equalise import background_spectrum, background_window
from cryorbit.types import CTFParams
from cryorbit.volumes.ball import BallBasis, BallSlices

_BLOCK = 1000  # images in memory at once
_CHECKED = 1500  # points of the ball at which density should not be negative


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
        Fourier pixels beyond the rings that functions of the map reach. With 0 even a true map has moments that are off in the last ring; with
        2 it has them.
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


@dataclass(frozen=True)
class MomentMap:
    """A map (D, D, D) float64 with its density over ``rotations`` (V, 3, 3), the final objective and relative errors of both moments."""

    volume: Float[Tensor, "d d d"]
    density: Float[Tensor, " v"]
    rotations: Float[Tensor, "v 3 3"]
    objective: float
    errors: tuple[float, float]


def particle_moments(particles: ParticleSource, rings: int, *, mask_diameter: float) -> ImageMoments:
    """Moments of a particle stack in one pass, a block of images in memory at a time; noise is measured around the particles.

    Parameters
    ----------
    particles
        Centred particles with their CTF; bright protein.
    rings
        Fourier pixels of the images' box that are looked at.
    mask_diameter
        Particle diameter in angstrom: pixels within it count, those outside are background.
    """
    radius = 0.5 * mask_diameter / particles.pixel_size
    basis = PolarBasis(particles.box, rings, min(radius, particles.box / 2))
    window, whole = background_window(particles.box, radius), fourier_disk(particles.box)
    blocks = torch.arange(len(particles)).split(_BLOCK)
    spectrum, total = torch.zeros(int(whole.shell.max()) + 1, dtype=torch.float64), None
    for block in blocks:
        images = torch.from_numpy(particles.read(block.numpy()))
        background = (images * window).sum(dim=(1, 2)) / window.sum()
        images = images - background[:, None, None]
        spectrum += len(block) / len(particles) * background_spectrum(images, window, whole).double()
        sums = ImageMomentSums.of(basis, images, 1.0, _ring_ctf(particles, block, basis))
        total = sums if total is None else total + sums
    assert total is not None
    spectrum[0] = spectrum[1]  # shell 0 of a background without its mean says nothing
    return total.debiased(spectrum)


def _ring_ctf(particles: ParticleSource, block: Int[Tensor, " b"], basis: PolarBasis) -> Float[Tensor, "b k"] | None:
    """The CTF on each ring, mean over eight directions."""
    if particles.ctf is None:
        return None
    params = CTFParams(**{name: torch.as_tensor(x)[block].double() for name, x in particles.ctf.items()})
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
    """

    def __init__(self, moments: ImageMoments, config: MomentsConfig, rings: int) -> None:
        self.moments, self.config = moments.within(rings), config
        polar = self.moments.basis
        self.basis = BallBasis(polar.box, polar.radius, rings + config.margin, config.degree)
        self.rotations = view_directions(config.order)
        self.slices = BallSlices(self.basis, self.rotations, rings, polar.orders)
        power = self.moments.power.clamp(min=0)
        self.weight = 1 / (power + config.floor * power.max()).float()
        inside = torch.randn(_CHECKED, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        reach = torch.rand(_CHECKED, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** (1 / 3)
        points = inside / inside.norm(dim=1, keepdim=True) * reach * polar.radius
        self.points = self.basis.values(points.numpy()).float()
        self.target = (self.moments.first.to(torch.complex64), self.moments.second.to(torch.complex64))

    def predicted(self, coefficients: Float[Tensor, " n"], logits: Float[Tensor, " v"]) -> ImageMoments:
        """Moments of a map and a density."""
        return moments_of_slices(self.slices(coefficients), torch.softmax(logits, 0), self.moments.basis)

    def objective(self, coefficients: Float[Tensor, " n"], logits: Float[Tensor, " v"]) -> Float[Tensor, ""]:
        """Weighted squared mismatch and penalty; about 1 for an empty map."""
        found, (first, second) = self.predicted(coefficients, logits), self.target
        both = self.weight[:, None] * self.weight
        twice = torch.full((len(second), 1, 1), 2.0)
        twice[0] = 1.0
        off_second = (twice * both * (found.second - second).abs().square()).sum()
        off_first = (self.weight * (found.first - first).abs().square()).sum()
        whole = (twice * both * second.abs().square()).sum() + (self.weight * first.abs().square()).sum()
        values = self.points @ coefficients
        negative = values.clamp(max=0).square().sum() / values.square().sum().clamp_min(1e-30)
        return (off_second + off_first) / whole + self.config.positivity * negative

    def minimised(
        self, coefficients: Float[Tensor, " n"], logits: Float[Tensor, " v"], iterations: int
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " v"], float]:
        """The same after L-BFGS, and the objective there."""
        n = len(coefficients)
        scale = float(coefficients.norm()) / n**0.5

        def loss(packed: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            x = torch.from_numpy(packed).float().requires_grad_()
            value = self.objective(scale * x[:n], x[n:])
            (gradient,) = torch.autograd.grad(value, x)
            return float(value.detach()), gradient.double().numpy()

        start = torch.cat([coefficients / scale, logits]).double().numpy()
        options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 20}
        found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        x = torch.from_numpy(found.x).float()
        return scale * x[:n], x[n:], float(found.fun)


def _carried(old: BallBasis, new: BallBasis, coefficients: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
    """The same function in a basis for more rings: radial functions are the same, there are more of them."""
    places = {tuple(row): i for i, row in enumerate(new.layout.int().tolist())}
    out = torch.zeros(len(new))
    out[[places[tuple(row)] for row in old.layout.int().tolist()]] = coefficients
    return out


def invert_moments(moments: ImageMoments, config: MomentsConfig, generator: torch.Generator) -> MomentMap:
    """The map whose moments are closest to ``moments``.

    Parameters
    ----------
    moments
        Debiased, of centred images.
    config
        Settings.
    generator
        Draws the starts.

    Raises
    ------
    ConfigError
        CONF115 settings out of range.
    """
    most = len(moments.first) - 1
    rings = config.rings or most
    if not (2 <= rings <= most and config.degree >= 1 and 1 <= config.kept <= config.starts and config.iterations > 0):
        raise ConfigError(
            "CONF115",
            f"{config} cannot invert moments on {most} rings",
            f"rings 2 to {most} (0: all), degree and iterations at least 1, kept from 1 to starts",
        )
    stages = sorted({max(2, rings // 2), max(2, round(0.8 * rings)), rings})
    fit = MomentFit(moments, config, stages[0])
    found = sorted((_random_start(fit, config, generator) for _ in range(config.starts)), key=lambda x: x[2])
    found = found[: config.kept]
    for stage in stages[1:]:
        wider = MomentFit(moments, config, stage)
        found = [
            wider.minimised(_carried(fit.basis, wider.basis, a), logits, config.iterations) for a, logits, _ in found
        ]
        fit = wider
    return _as_map(fit, min(found, key=lambda x: x[2]))


def invert_from(moments: ImageMoments, config: MomentsConfig, coefficients: Float[Tensor, " n"]) -> MomentMap:
    """The map near a given one whose moments are closest to ``moments``; all rings at once: the inner ones alone lead a good start astray.

    Parameters
    ----------
    moments
        Debiased, of centred images.
    config
        Settings; ``rings``, ``starts`` and ``kept`` are not looked at.
    coefficients
        In the basis of :class:`MomentFit`, of any scale.

    Raises
    ------
    ConfigError
        CONF119 not as many coefficients as the basis has.
    """
    fit = MomentFit(moments, config, len(moments.first) - 1)
    if len(coefficients) != len(fit.basis):
        raise ConfigError(
            "CONF119",
            f"a start of {len(coefficients)} coefficients for {fit.basis}, which has {len(fit.basis)}",
            "make it in the basis of MomentFit",
        )
    logits = torch.zeros(len(fit.rotations))
    return _as_map(fit, fit.minimised(_scaled(fit, coefficients, logits), logits, config.iterations))


def _as_map(fit: MomentFit, found: tuple[Float[Tensor, " n"], Float[Tensor, " v"], float]) -> MomentMap:
    """What was found, as a map."""
    coefficients, logits, objective = found
    errors = relative_errors(fit.predicted(coefficients, logits), fit.moments)
    return MomentMap(
        fit.basis.volume(coefficients),
        torch.softmax(logits, 0),
        fit.rotations,
        objective,
        (float(errors[0]), float(errors[1])),
    )


def _random_start(
    fit: MomentFit, config: MomentsConfig, generator: torch.Generator
) -> tuple[Float[Tensor, " n"], Float[Tensor, " v"], float]:
    """Random coefficients, fewer of high degree, of the right power; a density near uniform."""
    degree = fit.basis.layout[:, 0].float()
    a = torch.randn(len(fit.basis), generator=generator) / (1 + degree)
    logits = 0.1 * torch.randn(len(fit.rotations), generator=generator)
    return fit.minimised(_scaled(fit, a, logits), logits, config.iterations)


def _scaled(fit: MomentFit, a: Float[Tensor, " n"], logits: Float[Tensor, " v"]) -> Float[Tensor, " n"]:
    """The same map, of the right power."""
    power = fit.predicted(a, logits).power.sum() / fit.moments.power.sum().clamp_min(1e-30)
    return a / power.float().clamp_min(1e-30).sqrt()
