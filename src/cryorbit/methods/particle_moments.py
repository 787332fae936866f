"""Moments of particle stacks: what the CTF is on each ring, what the background says of the noise."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from operator import add, index

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.physics.ctf import ctf, wavelength
from cryorbit.physics.fourier import disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.image_moments import SHIFTED, ImageMoments, ImageMomentSums, check_shifts
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.third_moments import ThirdFilters, ThirdMoments, ThirdSums
from cryorbit.training.dataset import ParticleSource
from cryorbit.training.equalise import background_spectrum, background_window
from cryorbit.types import CTFParams

_BLOCK = 1000  # images in memory at once
_LARGE = 0.9  # of the defoci of a set are below the one that counts


class _Images:
    """A stack read a block at a time for its moments, and the noise of all of it, known at the end.

    ``basis``: rings within the particle; ``wide``: within the circle that it reaches where shifts and defocus carry it, or all of the image.
    """

    def __init__(
        self,
        particles: ParticleSource,
        rings: int,
        mask_diameter: float,
        shift_sigma: float,
        shifts: Float[np.ndarray, "n 2"] | None,
    ) -> None:
        own, self.sigma = 0.5 * mask_diameter / particles.pixel_size, shift_sigma / particles.pixel_size
        self.basis = PolarBasis(particles.box, rings, min(own, particles.box / 2))
        check_shifts(self.sigma, particles.box)
        self.ctf = None if particles.ctf is None else CTFParams.of(particles.ctf)
        for name, values in () if self.ctf is None else vars(self.ctf).items():
            if not bool(values.isfinite().all()):
                row = int(torch.nonzero(~values.isfinite())[0])
                raise DataError(
                    "DATA427", f"the {name} of image {row + 1} is not finite", "leave the image out, or mend it"
                )
        if not len(particles):
            raise DataError("DATA423", "no particles to measure moments of")
        if shifts is not None and not (shifts.shape == (len(particles), 2) and np.isfinite(shifts).all()):
            raise DataError(
                "DATA429",
                f"shifts of shape {shifts.shape} for {len(particles)} particles, or not finite",
                "give x and y for each",
            )
        self.moves = None if shifts is None else torch.from_numpy(shifts / -particles.pixel_size).float()
        self.radius = own + SHIFTED * self.sigma
        carried = 0.0 if self.ctf is None else _carried(self.ctf, self.basis, particles.pixel_size)
        self.wide = replace(self.basis, radius=min(self.radius + carried, particles.box / 2))
        self.particles = particles
        self.background = background_window(particles.box, self.radius)
        self.noise = torch.zeros(1)  # in units of the strength of each image's

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "b d d"], Float[Tensor, " b"], Float[Tensor, "b k"] | None]]:
        """Images without their background's mean, how strong the noise of each is, and the CTF on each ring."""
        particles, whole = self.particles, fourier_disk(self.particles.box)
        window, level = self.background, 0.0
        spectrum = torch.zeros(int(whole.shell.max()) + 1, dtype=torch.float64)
        for block in torch.arange(len(particles)).split(_BLOCK):
            images = torch.from_numpy(particles.read(block.numpy()))
            if not bool((fine := images.isfinite().all(dim=(1, 2))).all()):
                raise DataError(
                    "DATA419", f"image {int(block[~fine][0]) + 1} holds values that are not finite", "leave it out"
                )
            if self.moves is not None:
                images = disk_to_images(images_to_disk(images, whole) * phase_ramp(self.moves[block], whole), whole)
            background = (images * window).sum(dim=(1, 2)) / window.sum()
            images = images - background[:, None, None]
            strength = (images * window).square().sum(dim=(1, 2)) / window.square().sum()
            level += float(strength.sum()) / len(particles)
            spectrum += len(block) / len(particles) * background_spectrum(images, window, whole).double()
            h = None if self.ctf is None else _ring_ctf(self.ctf[block], self.basis, particles.pixel_size)
            yield images, strength, h
        spectrum[0] = spectrum[1]  # shell 0 of a background without its mean says nothing
        self.noise = spectrum / max(level, 1e-30)


def particle_moments(
    particles: ParticleSource,
    rings: int,
    *,
    mask_diameter: float,
    shifts: Float[np.ndarray, "n 2"] | None = None,
    shift_sigma: float = 0.0,
    errors: bool = False,
) -> ImageMoments:
    """First and second moments of a particle stack in one pass, a block of images in memory at a time.

    Noise is measured around the particles.

    Parameters
    ----------
    particles
        Particles with their CTF, centred but for ``shifts`` and ``shift_sigma``; bright protein.
    rings
        Fourier pixels of the images' box that are looked at.
    mask_diameter
        Particle diameter in angstrom: pixels within it count, those outside are background.
    shifts
        (N, 2) angstrom, estimated shifts of the particles, which are undone first: ``particles.shifts`` of a file with origins, as
        ``cryorbit align2d`` writes it.
    shift_sigma
        Standard deviation in angstrom of each coordinate of the shifts that are left, which an inversion reckons with.
    errors
        Whether to measure the variance of each moment too, for ``MomentsConfig.tolerance``.
    """
    images = _Images(particles, rings, mask_diameter, shift_sigma, shifts)
    sums = reduce(add, (ImageMomentSums.of(images.wide, block, v, h, errors=errors) for block, v, h in images))
    found = sums.debiased(images.noise, images.background)
    return replace(found, shift_sigma_px=images.sigma, particle_radius_px=images.basis.radius)


def particle_third_moments(
    particles: ParticleSource,
    rings: int,
    *,
    mask_diameter: float,
    shifts: Float[np.ndarray, "n 2"] | None = None,
    shift_sigma: float = 0.0,
    filters: int | ThirdFilters = 64,
    orders: int = 12,
    generator: torch.Generator,
) -> ThirdMoments:
    """Third moments of the same particles, in a pass of their own; the first block of images says how strong each ring is.

    Parameters
    ----------
    particles, rings, mask_diameter, shifts, shift_sigma
        As of :func:`particle_moments`.
    filters, orders
        How many random filters the images are seen through, and the largest order m of each pair; or filters that are there already, those
        of another part of the same particles.
    generator
        Draws the filters.

    Raises
    ------
    ConfigError
        CONF124 filters on other rings than these.
    """
    images = _Images(particles, rings, mask_diameter, shift_sigma, shifts)
    there, count = (filters, 0) if isinstance(filters, ThirdFilters) else (None, index(filters))
    if there is not None and there.basis != images.wide:
        raise ConfigError(
            "CONF124", f"filters on {there.basis} for images on {images.wide}", "draw them from particles like these"
        )
    sums: ThirdSums | None = None
    for block, v, h in images:
        if there is None:
            there = ThirdFilters.random(images.wide, count, orders, generator, block, h)
        part = ThirdSums.of(there, block, v, h)
        sums = part if sums is None else sums + part
    assert sums is not None
    return sums.debiased(images.noise, images.background)


def _carried(params: CTFParams, basis: PolarBasis, pixel_size: float) -> float:
    """Pixels by which a large defocus of the set moves the last ring: the wavelength times the defocus times the frequency."""
    defocus = (0.5 * (params.defocus_u + params.defocus_v)).abs().quantile(_LARGE)
    frequency = basis.rings / (basis.box * pixel_size)
    return float(wavelength(params.voltage).mean() * defocus * frequency) / pixel_size


def _ring_ctf(params: CTFParams, basis: PolarBasis, pixel_size: float) -> Float[Tensor, "b k"]:
    """The CTF on each ring, mean over eight directions."""
    angle = math.pi / 8 * torch.arange(8, dtype=torch.float64)
    ring = torch.arange(basis.rings + 1, dtype=torch.float64) / (basis.box * pixel_size)
    points = ring[:, None, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return ctf(params, points.reshape(-1, 2)).view(len(params), -1, 8).mean(dim=2).float()
