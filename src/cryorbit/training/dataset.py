"""Particle images as the Fourier pixels a method needs: read lazily, background-subtracted, cropped, cached when they fit,
with the same noise in every optics group.

Images are not masked: a masked map's projections are blind to what lies outside, and the CTF moves signal beyond any tight circle.

One image's way from disk to loss: ``io.particles`` reads it, :class:`FourierStack` transforms it, the method scores it.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cryorbit.errors import ConfigError
from cryorbit.physics.ctf import ctf_on_disk, ctf_phase, frequencies_of, wavelength
from cryorbit.physics.fourier import (
    Columns,
    FourierDisk,
    crop_fourier,
    disk_subset,
    disk_to_images,
    fourier_disk,
    fourier_to_image,
    image_to_fourier,
)
from cryorbit.physics.spectrum import shell_mean
from cryorbit.training.equalise import (
    background_spectrum,
    background_window,
    is_emptied,
    measure_factors,
    pooled_groups,
)
from cryorbit.types import CTFParams

_CHUNK = 512
_SAMPLE = 500  # images whose power is measured


@runtime_checkable
class ParticleSource(Protocol):
    """What a :class:`FourierStack` reads: ``io.particles.ParticleSet`` on disk, or :class:`ArrayParticles` in memory."""

    @property
    def box(self) -> int:
        """Side of an image in pixels."""
        ...

    @property
    def pixel_size(self) -> float:
        """Angstrom per pixel."""
        ...

    @property
    def ctf(self) -> dict[str, NDArray[np.float64]] | None:
        """``CTFParams`` fields by name, or None."""
        ...

    @property
    def optics_group(self) -> NDArray[np.int64] | None:
        """(N,) number of each particle's optics group, or None for one group."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """(M, D, D) images."""
        ...


@dataclass(frozen=True)
class ArrayParticles:
    """Particles in memory: ``images`` (N, D, D) float32, ``pixel_size`` angstrom, ``ctf`` ``CTFParams`` fields by name or None,
    ``optics_group`` (N,) or None for one group."""

    images: NDArray[np.float32]
    pixel_size: float
    ctf: dict[str, NDArray[np.float64]] | None = None
    optics_group: NDArray[np.int64] | None = None

    @property
    def box(self) -> int:
        """Side of an image in pixels."""
        return int(self.images.shape[-1])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """(M, D, D) images."""
        return self.images[indices]


@dataclass(frozen=True)
class Downsampled:
    """``particles`` Fourier cropped to ``box`` pixels as they are read; values of the transform stay, so a pixel holds what went into it."""

    particles: ParticleSource
    box: int

    @property
    def pixel_size(self) -> float:
        """Angstrom per pixel."""
        return self.particles.pixel_size * self.particles.box / self.box

    @property
    def ctf(self) -> dict[str, NDArray[np.float64]] | None:
        """``CTFParams`` fields by name, or None."""
        return self.particles.ctf

    @property
    def optics_group(self) -> NDArray[np.int64] | None:
        """(N,) number of each particle's optics group, or None for one group."""
        return self.particles.optics_group

    def __len__(self) -> int:
        return len(self.particles)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """(M, D, D) images."""
        images = self.particles.read(indices)
        if self.box == self.particles.box:
            return images
        parts = torch.from_numpy(images).split(_CHUNK)
        small = (crop_fourier(image_to_fourier(part), self.particles.box, self.box) for part in parts)
        return torch.cat([fourier_to_image(part, self.box) for part in small]).numpy()


def working_box(box: int, radius: float) -> int:
    """Smallest even box whose transform holds ``radius`` Fourier pixels with two to spare, or ``box`` itself."""
    small = 2 * (int(radius) + 3)
    return small if small < box else box


class FourierStack:
    """The particles of a set as Fourier pixels of one disk.

    Where particles are of several optics groups, :meth:`images` and :meth:`ctf` carry their group's whitening factor (see
    ``training.equalise``), so that one noise spectrum holds for all; :meth:`equalisation` undoes it. ``equalise=False`` leaves it out.

    Parameters
    ----------
    particles
        The stack, opened lazily.
    radius
        Largest ``|k|`` in Fourier pixels to keep.
    mask_diameter
        Particle diameter in angstrom: pixels outside it are background, whose mean is subtracted from every image.
    memory_gib
        Budget for the cache of Fourier pixels. A stack that does not fit is read again, chunk by chunk, at every pass.
    device
        Where batches are delivered.
    equalise
        Whether to make the optics groups' noise equal.
    """

    def __init__(
        self,
        particles: ParticleSource,
        radius: float,
        *,
        mask_diameter: float,
        memory_gib: float = 4.0,
        device: torch.device | str = "cpu",
        equalise: bool = True,
    ) -> None:
        self.particles = particles
        self.box = working_box(particles.box, radius)
        self.pixel_size = particles.pixel_size * particles.box / self.box
        self.disk: FourierDisk = fourier_disk(self.box, float(radius))
        self.device = torch.device(device)
        self._full_disk = fourier_disk(particles.box, float(radius))
        half = 0.5 * mask_diameter / particles.pixel_size
        axis = torch.arange(particles.box, dtype=torch.float32) - particles.box // 2
        self.background: Bool[Tensor, "d d"] = torch.hypot(axis[:, None], axis) > min(half, 0.5 * particles.box - 1)
        """Which pixels of an image are outside the mask diameter."""
        self._window = background_window(particles.box, half)
        self._group: Int[Tensor, " n"] | None = None
        if equalise and particles.optics_group is not None:
            group = pooled_groups(torch.as_tensor(particles.optics_group, dtype=torch.int64))
            self._group = group if int(group.max()) > 0 else None
        self._ctf = None
        if particles.ctf is not None:
            self._ctf = CTFParams.of(particles.ctf, torch.float32).to(self.device)
        self.defocus_offset: Float[Tensor, " n"] = torch.zeros(len(particles))
        """Angstrom added to each particle's DefocusU and DefocusV; methods that estimate it set it."""
        self._cached = len(particles) * len(self.disk) * 8 <= memory_gib * 2**30

    def __len__(self) -> int:
        return len(self.particles)

    def _transform(self, indices: Int[Tensor, " b"]) -> Complex[Tensor, "b p"]:
        out = []
        for part in indices.split(_CHUNK):
            images = self.raw(part)
            images = images - images[:, self.background.to(self.device)].mean(dim=1)[:, None, None]
            rows, columns = self._full_disk.ky % self.particles.box, self._full_disk.kx
            values = image_to_fourier(images)[:, rows, columns] * self.scale
            out.append(values if self._group is None else values * self.equalisation(part))
        return torch.cat(out)

    @property
    def is_equalised(self) -> bool:
        """Whether the particles are of several optics groups whose noise is made equal."""
        return self._group is not None

    def raw(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b d d"]:
        """The particles ``indices`` as they are on disk."""
        return torch.from_numpy(self.particles.read(indices.cpu().numpy())).to(self.device)

    def to_raw(self, values: Complex[Tensor, "b p"]) -> Float[Tensor, "b d d"]:
        """Images on the grid and the scale of :meth:`raw` from Fourier pixels like those of :meth:`images`, without an
        :meth:`equalisation`; differentiable. Their background is 0."""
        return disk_to_images(values / self.scale, self._full_disk.to(self.device))

    @cached_property
    def _factors(self) -> Float[Tensor, "g s"]:
        """Whitening factor of each group and shell."""
        assert self._group is not None

        def read(indices: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(self.particles.read(indices)).to(self.device)

        return measure_factors(read, self._group, self._window, self._full_disk).to(self.device)

    def equalisation(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b p"]:
        """Factor that :meth:`images` and :meth:`ctf` of the particles ``indices`` carry; ones for one optics group.

        ``images / (scale * equalisation)`` are the transforms of the images on disk, ``ctf / equalisation`` is the CTF alone.
        """
        if self._group is None:
            return torch.ones(len(indices), len(self.disk), device=self.device)
        return self._factors[self._group[indices.cpu()].to(self.device)][:, self.disk.shell.to(self.device)]

    @cached_property
    def scale(self) -> float:
        """The factor between the images on disk and what methods see: a sample of images has unit mean power per Fourier pixel."""
        step = max(1, len(self.particles) // 200)
        sample = torch.from_numpy(self.particles.read(torch.arange(0, len(self.particles), step)[:200].numpy()))
        spread = float((sample - sample.mean(dim=(1, 2), keepdim=True)).square().mean().sqrt())
        return 1.0 / (self.particles.box * max(spread, 1e-30))

    @cached_property
    def power(self) -> Float[Tensor, " s"]:
        """Mean of ``|images|^2`` per shell, over an even sample of the particles."""
        images = self.images(self._sample)
        return shell_mean(images.abs().square().mean(dim=0), self.disk.to(self.device), self._shells).cpu()

    @cached_property
    def background_power(self) -> Float[Tensor, " s"] | None:
        """What :attr:`power` would be of the noise around the particles alone; None where the images were masked and there is none.

        What the CTF spreads over the background and neighbours count as noise. Shell 0 says nothing.
        """
        total = torch.zeros(self._shells)
        for part in self._sample.split(_CHUNK):
            groups = torch.zeros_like(part) if self._group is None else self._group[part]
            for group in groups.unique():
                chosen = part[groups == group]
                images = torch.from_numpy(self.particles.read(chosen.numpy()))
                spectrum = background_spectrum(images, self._window, self._full_disk)
                factor = 1.0 if self._group is None else self._factors[group].cpu()[: self._shells].square()
                total += len(chosen) / len(self._sample) * factor * spectrum[: self._shells]
        total *= (self.scale * self.particles.box) ** 2
        return None if is_emptied(total, self.power) else total

    @property
    def background_images(self) -> float:
        """How many whole images the background amounts to that :attr:`background_power` was measured on."""
        return len(self._sample) * float(self._window.square().mean())

    @property
    def _sample(self) -> Int[Tensor, " m"]:
        return torch.arange(0, len(self), max(1, len(self) // _SAMPLE))[:_SAMPLE]

    @property
    def _shells(self) -> int:
        return int(self.disk.shell.max()) + 1

    @cached_property
    def _cache(self) -> Complex[Tensor, "n p"]:
        return self._transform(torch.arange(len(self)))

    def images(self, indices: Int[Tensor, " b"]) -> Complex[Tensor, "b p"]:
        """Fourier pixels of the particles ``indices``, noise made equal."""
        return self._cache[indices.to(self.device)] if self._cached else self._transform(indices.cpu())

    def ctf(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b p"]:
        """CTF of the particles ``indices`` on the disk, ones when the particles carry none, times their :meth:`equalisation`."""
        if self._ctf is None:
            return self.equalisation(indices)
        params = self._ctf[indices.to(self.device)]
        offset = self.defocus_offset[indices.cpu()].to(self.device)
        params = replace(params, defocus_u=params.defocus_u + offset, defocus_v=params.defocus_v + offset)
        values = ctf_on_disk(params, self.disk.to(self.device), self.pixel_size)
        return values if self._group is None else values * self.equalisation(indices)

    def ctf_phase(
        self, indices: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b p"], Float[Tensor, " b"]]:
        """The CTF of the particles ``indices`` without their offset as phase and amplitude, :meth:`equalisation` in the latter, and how
        fast the phase falls with defocus: radian per angstrom and ``|k|^2`` in Fourier pixels.

        Raises
        ------
        ConfigError
            The particles carry no CTF.
        """
        if self._ctf is None:
            raise ConfigError("CONF108", "the particles have no CTF whose defocus could be refined")
        params = self._ctf[indices.to(self.device)]
        disk = self.disk.to(self.device)
        gamma, gain = ctf_phase(params, frequencies_of(disk, self.pixel_size, params.defocus_u))
        rate = math.pi * wavelength(params.voltage) / (self.box * self.pixel_size) ** 2
        return gamma, gain * self.equalisation(indices), rate

    def at_radius(self, radius: int | None) -> tuple[FourierDisk, Columns]:
        """The disk of a smaller ``radius`` (None: the whole) and the columns of :meth:`images` and :meth:`ctf` that belong to it."""
        if radius is None or radius >= self.disk.radius:
            return self.disk.to(self.device), slice(None)
        disk = fourier_disk(self.box, float(radius))
        return disk.to(self.device), disk_subset(self.disk, disk).to(self.device)
