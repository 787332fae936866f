"""Particle images with known truth: poses, CTF, signal and noise, in memory or as a stream of chunks.

The SNR is defined once, here: the mean over images of the variance of the clean image (CTF applied, shifted) over all
its pixels, divided by the noise variance of a pixel; in decibels ``10 log10`` of it (papers/001 table 1; papers/002
section 6). Images are scaled so that the noise has variance 1, as in extracted particles; without noise, so that the
mean clean variance is 1.

Counts (``noise="poisson"``, papers/002 appendix D) are on the scale of a detector: a pixel has the rate ``dose + clean image``, and where
no particle is its noise has the variance ``dose``. That is the noise of the SNR, ``dose * contrast^2``, the contrast being the standard
deviation of the clean image over the dose.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from cryorbit.conventions import snr_from_db
from cryorbit.errors import ConfigError
from cryorbit.io.implausible import MIN_BOX
from cryorbit.physics.ctf import ctf_on_disk
from cryorbit.physics.fourier import FourierDisk, disk_to_images
from cryorbit.physics.noise import coloured_spectrum, radial_noise, white_noise
from cryorbit.physics.shift import phase_ramp
from cryorbit.simulate.atoms import AtomicModel
from cryorbit.simulate.orientations import Orientations
from cryorbit.simulate.project_atoms import AtomProjector
from cryorbit.simulate.project_map import MapProjector
from cryorbit.simulate.settings import CTFSettings, SimulationSettings, in_range
from cryorbit.types import CTFParams, Poses, Volume

CHUNK = 64
MAX_BOX = 2048
MIN_PIXEL_SIZE, MAX_PIXEL_SIZE = 0.05, 100.0
_PILOT = 512
_BYTES_PER_VOXEL = 60


@runtime_checkable
class Projector(Protocol):
    """What images are made from: an :class:`AtomProjector` or a ``MapProjector``."""

    box: int
    pixel_size: float
    disk: FourierDisk

    def __call__(self, rotations: Float[Tensor, "b 3 3"]) -> Complex[Tensor, "b p"]: ...

    def volume(self) -> Float[Tensor, "d d d"]: ...


@dataclass(frozen=True)
class SimulatedParticles:
    """Images and all that is true of them.

    Attributes
    ----------
    images
        (N, D, D) float32.
    poses, ctf
        The truth of each particle; ``ctf`` None for ideal images.
    volume
        The map whose projections, CTF applied and shifted, are the clean images.
    clean_variance
        Mean over images of the clean image's variance.
    noise_variance
        Of a pixel: 1, or 0 without noise; of counts the dose.
    noise_spectrum
        (S,) variance per shell.
    """

    images: Float[Tensor, "n d d"]
    poses: Poses
    ctf: CTFParams | None
    volume: Volume
    clean_variance: float
    noise_variance: float
    noise_spectrum: Float[Tensor, " s"]

    @property
    def pixel_size(self) -> float:
        """Angstrom per pixel."""
        return self.volume.pixel_size

    @property
    def snr(self) -> float:
        """Realised signal variance over noise variance; infinite without noise."""
        return self.clean_variance / self.noise_variance if self.noise_variance else math.inf


class Simulation:
    """One simulated data set: draws every parameter at once, makes images chunk by chunk, the same however they are
    asked for.

    The signal's scale is set by the first 512 particles, so the realised SNR of a larger set differs by their
    sampling error (below 0.05 dB in practice); ``clean_variance`` after all chunks is exact.

    Attributes
    ----------
    poses, ctf
        The truth.
    gain
        What the source is multiplied by in images and in ``volume``.
    """

    def __init__(self, projector: Projector, settings: SimulationSettings) -> None:
        self.projector, self.settings = projector, settings
        in_range(
            "CONF332",
            f"shifts' standard deviation in a box of {projector.box} px",
            settings.shift_sigma_px,
            0,
            projector.box / 4,
            " px (a quarter of the box)",
            "--shift-sigma",
        )
        states = np.random.SeedSequence(settings.seed).generate_state(2)
        generator = torch.Generator().manual_seed(int(states[0]))
        self._noise_seed = int(states[1])
        rotations = settings.orientations.sample(settings.count, generator)
        shifts = torch.randn(settings.count, 2, generator=generator) * (settings.shift_sigma_px * projector.pixel_size)
        self.poses = Poses(rotations, shifts)
        self.ctf = settings.ctf.sample(settings.count, generator) if settings.ctf is not None else None
        self.noise_spectrum = self._spectrum()
        pilot = torch.cat(
            [self._variance(self._clean(start)) for start in range(0, min(settings.count, _PILOT), CHUNK)]
        )
        power = float(pilot.mean())
        if not math.isfinite(power):
            raise ConfigError(
                "CONF335", "the images overflow float32", "the values of the model or map are too large: scale them"
            )
        if power == 0:
            raise ConfigError(
                "CONF335", "the images have no signal", "the model or map is constant, or wider than the box"
            )
        wanted = 1.0 if settings.snr_db is None else snr_from_db(settings.snr_db) * self.noise_variance
        self.gain = math.sqrt(wanted / power)

    @property
    def noise_variance(self) -> float:
        """Of a pixel: 1, or 0 without noise; of counts the dose."""
        if self.settings.dose is not None:
            return self.settings.dose
        return 0.0 if self.settings.snr_db is None else 1.0

    @property
    def volume(self) -> Volume:
        """The map whose projections the clean images are."""
        return Volume(self.projector.volume() * self.gain, self.projector.pixel_size)

    def chunks(self) -> Iterator[tuple[Float[Tensor, "m d d"], Float[Tensor, " m"]]]:
        """Yield (images, variance of each clean image) in order, ``CHUNK`` at a time; each call starts afresh."""
        generator = torch.Generator().manual_seed(self._noise_seed)
        box = self.projector.box
        for start in range(0, self.settings.count, CHUNK):
            values = self._clean(start) * self.gain
            images = disk_to_images(values, self.projector.disk)
            if self.settings.dose is not None:
                images = torch.poisson(self._rates(images, self.settings.dose), generator=generator)
            elif self.settings.snr_db is not None and self.settings.noise == "white":
                images = images + white_noise(len(images), box, 1.0, generator)
            elif self.settings.snr_db is not None:
                images = images + radial_noise(len(images), box, self.noise_spectrum, generator)
            yield images, self._variance(values)

    def _rates(self, clean: Tensor, dose: float) -> Tensor:
        """Electrons expected in each pixel."""
        rates = dose + clean
        if float(rates.min()) < 0:
            raise ConfigError(
                "CONF344",
                f"a pixel would have {float(rates.min()):.3g} electrons: at a dose of {dose:g} and an SNR of "
                f"{self.settings.snr_db:g} dB the clean images fall to {float(clean.min()) / dose:.3g} of the dose, expected -1 or more",
                "lower --snr-db or raise --dose: the contrast is the square root of SNR / dose",
            )
        return rates

    def _spectrum(self) -> Tensor:
        spectrum = coloured_spectrum(self.projector.box, self.projector.pixel_size)
        if self.settings.noise == "coloured" and self.settings.snr_db is not None:
            return spectrum
        return torch.full_like(spectrum, self.noise_variance)

    def _clean(self, start: int) -> Tensor:
        """Transforms of clean images ``start`` .. ``start + CHUNK`` before scaling."""
        part = slice(start, min(start + CHUNK, self.settings.count))
        values = self.projector(self.poses.rotations[part])
        if self.settings.shift_sigma_px:
            values = values * phase_ramp(self.poses.shifts[part] / self.projector.pixel_size, self.projector.disk)
        if self.ctf is not None:
            values = values * ctf_on_disk(self.ctf[part], self.projector.disk, self.projector.pixel_size)
        return values

    def _variance(self, values: Tensor) -> Tensor:
        """Variance over all pixels of each image, by Parseval: the origin is the mean."""
        disk = self.projector.disk
        weight = torch.where(disk.kx**2 + disk.ky**2 > 0, disk.weight, 0.0)
        return ((values.real**2 + values.imag**2) * weight).sum(-1) / disk.box**4


def _memory() -> float:
    """Bytes of memory of this machine; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def make_projector(source: AtomicModel | Volume, box: int, pixel_size: float, fast: bool = False) -> Projector:
    """The projector of a model (exact; ``fast``: slices of its map) or of a map, which must already have this box and
    pixel size.

    A box is 8 to 2048 px, a pixel 0.05 to 100 A.

    Raises
    ------
    ConfigError
        CONF336 bad box or pixel size; CONF337 a map of another box or pixel size.
    """
    in_range("CONF336", "box", box, MIN_BOX, MAX_BOX, " px", "--box")
    in_range("CONF336", "pixel size", pixel_size, MIN_PIXEL_SIZE, MAX_PIXEL_SIZE, " A", "--pixel-size")
    if isinstance(source, AtomicModel):
        needed, held = _BYTES_PER_VOXEL * box**3, _memory()
        if needed > held:
            raise ConfigError(
                "CONF336",
                f"a map of {box} px takes about {needed / 1e9:,.0f} GB of memory to make, this machine has "
                f"{held / 1e9:,.0f}",
                "use a smaller --box",
            )
        exact = AtomProjector(source, box, pixel_size)
        if not fast:
            return exact
        source = Volume(exact.volume(), pixel_size)
    elif source.box != box or abs(source.pixel_size - pixel_size) > 1e-3 * pixel_size:
        raise ConfigError(
            "CONF337",
            f"the map is {source.box} px at {source.pixel_size:g} A, the images asked for {box} px at {pixel_size:g} A",
            "leave --box and --pixel-size out, or resample the map first",
        )
    return MapProjector(source)


def simulate_particles(
    source: AtomicModel | Volume,
    *,
    count: int,
    box: int,
    pixel_size: float,
    snr_db: float | None = 0.0,
    ctf: CTFSettings | None = None,
    shift_sigma_px: float = 0.0,
    orientations: Orientations | None = None,
    noise: Literal["white", "coloured", "poisson"] = "white",
    fast: bool = False,
    seed: int = 0,
    dose: float | None = None,
) -> SimulatedParticles:
    """Simulate ``count`` particles in memory.

    Parameters
    ----------
    source
        Atoms (projected exactly; ``fast``: by slices of their map), or a map.
    count, box, pixel_size
        Images, pixels, angstrom.
    snr_db, ctf, shift_sigma_px, orientations, noise, seed, dose
        See :class:`SimulationSettings`.
    fast
        Slice the map instead of summing over atoms.

    Raises
    ------
    ConfigError, DataError
        A value that cannot be used, a model that does not fit the box, or a contrast at which a pixel would have fewer than no electrons.
    """
    settings = SimulationSettings(count, snr_db, ctf, shift_sigma_px, orientations or Orientations(), noise, seed, dose)
    simulation = Simulation(make_projector(source, box, pixel_size, fast), settings)
    images = torch.empty(count, box, box)
    variance = torch.empty(count)
    done = 0
    for chunk, clean in simulation.chunks():
        images[done : done + len(chunk)], variance[done : done + len(chunk)] = chunk, clean
        done += len(chunk)
    return SimulatedParticles(
        images,
        simulation.poses,
        simulation.ctf,
        simulation.volume,
        float(variance.to(torch.float64).mean()),
        simulation.noise_variance,
        simulation.noise_spectrum,
    )
