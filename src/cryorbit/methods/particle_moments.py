"""Moments of particle stacks: one pass over the images, resumed where it was stopped, parts added whichever process summed them.

:class:`ParticleMoments` is the pass, a ``training.loop.Method`` whose step is a block of images; :class:`ParticleSums` is what it leaves: what
the CTF is on each ring and what the background says of the noise are in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.errors import ConfigError, DataError
from cryorbit.physics.ctf import ctf, wavelength
from cryorbit.physics.fourier import disk_to_images, fourier_disk, images_to_disk
from cryorbit.physics.image_moments import SHIFTED, ImageMoments, ImageMomentSums, Spread, added, check_shifts
from cryorbit.physics.polar import PolarBasis
from cryorbit.physics.shift import phase_ramp
from cryorbit.physics.third_moments import ThirdFilters, ThirdMoments, ThirdSums
from cryorbit.training.checkpoint import State
from cryorbit.training.dataset import ParticleSource
from cryorbit.training.equalise import background_spectrum, background_window
from cryorbit.types import CTFParams

_BLOCK = 1000  # images in memory at once
_LARGE = 0.9  # of the defoci of a set are below the one that counts


@dataclass(frozen=True)
class ParticleMomentsConfig:
    """Settings of ``cryorbit moments``, but for the inversion's.

    Attributes
    ----------
    periods
        The last ring that maps are first looked for on, in periods per particle diameter.
    resolution
        Angstrom to which the map is then followed outwards, ring by ring; 0: not.
    filters, orders
        Random filters that third moments are seen through (0: no third moments), and their largest order.
    shift_sigma
        Standard deviation in angstrom of each coordinate of shifts that are left in the images.
    part, parts
        Sum only this part of the images, of so many.
    """

    periods: float = 8.0
    resolution: float = 0.0
    filters: int = 64
    orders: int = 12
    shift_sigma: float = 0.0
    part: int = 1
    parts: int = 1


@dataclass(frozen=True)
class ParticleSums:
    """Running sums over images of a stack; sums of parts add up.

    Attributes
    ----------
    moments, third
        Of both moments, and of third ones, if asked for.
    spectrum, strength
        Sums over images of the spectrum of the background, and of its variance.
    particle_radius_px, shift_sigma_px
        Radius of the circle of centred particles, and what shifts were reckoned with.
    """

    moments: ImageMomentSums
    third: ThirdSums | None
    spectrum: Float[Tensor, " s"]
    strength: float
    particle_radius_px: float
    shift_sigma_px: float

    def __add__(self, other: "ParticleSums") -> "ParticleSums":
        mine, others = ((x.particle_radius_px, x.shift_sigma_px, x.third is None) for x in (self, other))
        if mine != others:
            raise DataError(
                "DATA430",
                f"moments of particles of radius {mine[0]:g} px and shifts of {mine[1]:g} px beside {others[0]:g} and {others[1]:g}, or third "
                "moments in one of them only",
                "sum both with the same settings",
            )
        third = None if self.third is None or other.third is None else self.third + other.third
        kept = ("third", "particle_radius_px", "shift_sigma_px")
        return replace(self, third=third, **added(self, other, *kept))

    @property
    def noise(self) -> Float[Tensor, " s"]:
        """Spectrum of the noise of an image of strength 1; shell 0 of a background without its mean says nothing."""
        spectrum = self.spectrum / max(self.strength, 1e-30)
        return torch.cat([spectrum[1:2], spectrum[1:]])

    @property
    def background(self) -> Float[Tensor, "d d"]:
        """Window whose mean was taken off each image."""
        return background_window(self.moments.basis.box, self.particle_radius_px + SHIFTED * self.shift_sigma_px)

    def image_moments(self) -> ImageMoments:
        """Without noise."""
        found = self.moments.debiased(self.noise, self.background)
        return replace(found, shift_sigma_px=self.shift_sigma_px, particle_radius_px=self.particle_radius_px)

    def third_moments(self) -> ThirdMoments | None:
        """Without noise; None where they were not summed."""
        return None if self.third is None else self.third.debiased(self.noise, self.background)

    def state(self) -> State:
        """All as tensors."""
        basis, out = self.moments.basis, {"spectrum": self.spectrum}
        out |= _tensors(self.moments, "moments.", "basis", "spread")
        if self.moments.spread is not None:
            out |= _tensors(self.moments.spread, "spread.")
        if self.third is not None:
            out |= _tensors(self.third, "third.", "filters") | {"filters": self.third.filters.weights}
        numbers = (basis.box, basis.rings, basis.radius, self.strength, self.particle_radius_px, self.shift_sigma_px)
        orders = 0 if self.third is None else self.third.filters.orders
        return out | {"numbers": torch.tensor([*numbers, orders], dtype=torch.float64)}

    @staticmethod
    def of_state(state: State) -> "ParticleSums":
        """Inverse of :meth:`state`."""
        box, rings, radius, strength, particle_radius, sigma, orders = state["numbers"].tolist()
        basis, third = PolarBasis(int(box), int(rings), radius), None
        spread = Spread(**_fields(Spread, state, "spread.")) if "spread.square" in state else None
        moments = ImageMomentSums(basis=basis, spread=spread, **_fields(ImageMomentSums, state, "moments."))
        if "filters" in state:
            filters = ThirdFilters(basis, state["filters"], int(orders))
            third = ThirdSums(filters=filters, **_fields(ThirdSums, state, "third."))
        return ParticleSums(moments, third, state["spectrum"], strength, particle_radius, sigma)


def _tensors(x: object, prefix: str, *other: str) -> State:
    """Fields of a dataclass but the ``other`` ones; counts as whole numbers."""
    return {prefix + f.name: torch.as_tensor(getattr(x, f.name)) for f in fields(x) if f.name not in other}  # type: ignore[arg-type]


def _fields(kind: type, state: State, prefix: str) -> dict[str, Any]:
    """Inverse of :func:`_tensors`."""
    there = {f.name: state[prefix + f.name] for f in fields(kind) if prefix + f.name in state}
    return {name: int(value) if name == "count" else value for name, value in there.items()}


class ParticleMoments:
    """One pass over a stack, a block of images in memory at a time. Noise is measured around the particles.

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
    filters, orders
        How many random filters third moments are seen through (0: no third moments), and the largest order m of each pair; or filters that
        are there already, those of another part of the same particles. The first block of ``particles`` says how strong each ring is.
    generator
        Draws the filters.
    reaches
        Rings beyond which filters do not look, so many filters for each; none: all rings.
    rows
        Which particles to sum; None for all.
    device
        Where it is done.
    name
        Of the stage.

    Raises
    ------
    ConfigError
        CONF124 filters on other rings than these.
    DataError
        DATA416 shifts of no standard deviation; DATA423 no particles; DATA427 a CTF that is not finite; DATA429 shifts of other particles.
    """

    def __init__(
        self,
        particles: ParticleSource,
        rings: int,
        *,
        mask_diameter: float,
        shifts: Float[np.ndarray, "n 2"] | None = None,
        shift_sigma: float = 0.0,
        errors: bool = False,
        filters: int | ThirdFilters = 0,
        orders: int = 12,
        generator: torch.Generator | None = None,
        reaches: Sequence[int] = (),
        rows: Int[Tensor, " m"] | None = None,
        device: torch.device | str = "cpu",
        name: str = "moments",
    ) -> None:
        self.name, self.particles, self.errors, self.device = name, particles, errors, torch.device(device)
        own, self.sigma = 0.5 * mask_diameter / particles.pixel_size, shift_sigma / particles.pixel_size
        self.basis = PolarBasis(particles.box, rings, min(own, particles.box / 2))
        check_shifts(self.sigma, particles.box)
        self.ctf = None if particles.ctf is None else CTFParams.of(particles.ctf)
        for field, values in () if self.ctf is None else vars(self.ctf).items():
            if not bool(values.isfinite().all()):
                row = int(torch.nonzero(~values.isfinite())[0])
                raise DataError(
                    "DATA427", f"the {field} of image {row + 1} is not finite", "leave the image out, or mend it"
                )
        self.rows = torch.arange(len(particles)) if rows is None else rows
        if not len(self.rows):
            raise DataError("DATA423", "no particles to measure moments of")
        if shifts is not None and not (shifts.shape == (len(particles), 2) and np.isfinite(shifts).all()):
            raise DataError(
                "DATA429",
                f"shifts of shape {shifts.shape} for {len(particles)} particles, or not finite",
                "give x and y for each",
            )
        self.moves = None if shifts is None else torch.from_numpy(shifts / -particles.pixel_size).float()
        radius = self.basis.radius + SHIFTED * self.sigma
        carried = 0.0 if self.ctf is None else _carried(self.ctf, self.basis, particles.pixel_size)
        self.wide = replace(self.basis, radius=min(radius + carried, particles.box / 2))
        """What images are seen on: the circle that particles reach where shifts and defocus carry them, or all of the image."""
        self.window = background_window(particles.box, radius)
        self.disk = fourier_disk(particles.box)
        self.filters = self._filters(filters, orders, generator, reaches)
        self.sums: ParticleSums | None = None

    def _filters(
        self, filters: int | ThirdFilters, orders: int, generator: torch.Generator | None, reaches: Sequence[int]
    ) -> ThirdFilters | None:
        if isinstance(filters, ThirdFilters):
            if filters.basis != self.wide:
                raise ConfigError(
                    "CONF124", f"filters on {filters.basis} for images on {self.wide}", "draw them from such particles"
                )
            return filters
        if not (count := index(filters)):
            return None
        images, _, h = self._read(torch.arange(min(_BLOCK, len(self.particles))))
        return ThirdFilters.random(self.wide, count, orders, generator or torch.Generator(), images, h, reaches)

    def _read(self, block: Int[Tensor, " b"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images without their background's mean, how strong the noise of each is, and the CTF on each ring."""
        images = torch.from_numpy(self.particles.read(block.numpy()))
        if not bool((fine := images.isfinite().all(dim=(1, 2))).all()):
            raise DataError(
                "DATA419", f"image {int(block[~fine][0]) + 1} holds values that are not finite", "leave it out"
            )
        images, window = images.to(self.device), self.window.to(self.device)
        if self.moves is not None:
            ramp = phase_ramp(self.moves[block], self.disk).to(self.device)
            disk = self.disk.to(self.device)
            images = disk_to_images(images_to_disk(images, disk) * ramp, disk)
        images = images - ((images * window).sum(dim=(1, 2)) / window.sum())[:, None, None]
        strength = (images * window).square().sum(dim=(1, 2)) / window.square().sum()
        h = None if self.ctf is None else _ring_ctf(self.ctf[block], self.basis, self.particles.pixel_size)
        return images, strength, h

    def total_steps(self) -> int:
        """Blocks of images."""
        return math.ceil(len(self.rows) / _BLOCK)

    def finished(self) -> bool:
        """Never before the last block."""
        return False

    def step(self, index: int) -> dict[str, float | str]:
        """Add a block of images."""
        block = self.rows[index * _BLOCK : (index + 1) * _BLOCK]
        images, strength, h = self._read(block)
        third = None if self.filters is None else ThirdSums.of(self.filters, images, strength, h)
        part = ParticleSums(
            ImageMomentSums.of(self.wide, images, strength, h, errors=self.errors),
            third,
            len(block) * background_spectrum(images, self.window.to(self.device), self.disk.to(self.device)).double(),
            float(strength.double().sum()),
            self.basis.radius,
            self.sigma,
        )
        part = ParticleSums.of_state({name: value.cpu() for name, value in part.state().items()})
        self.sums = part if self.sums is None else self.sums + part
        return {"images": float(self.sums.moments.count), "resolution_A": self.finest}

    def state(self) -> State:
        """The sums."""
        return {} if self.sums is None else self.sums.state()

    @property
    def finest(self) -> float:
        """Angstrom, of the last ring."""
        return self.particles.box * self.particles.pixel_size / self.basis.rings

    def load_state(self, state: State) -> None:
        """Inverse of :meth:`state`."""
        self.sums = ParticleSums.of_state(state) if state else None

    def summed(self) -> ParticleSums:
        """All blocks that are not yet there."""
        done = 0 if self.sums is None else math.ceil(self.sums.moments.count / _BLOCK)
        for i in range(done, self.total_steps()):
            self.step(i)
        assert self.sums is not None
        return self.sums


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
