"""What a simulation draws for each particle: CTF, shifts, orientations, noise."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cryorbit.conventions import snr_from_db
from cryorbit.errors import ConfigError
from cryorbit.simulate.orientations import Orientations
from cryorbit.types import CTFParams

MAX_COUNT = 10_000_000
MAX_DEFOCUS = 200_000.0
"""Angstrom."""
MIN_DOSE, MAX_DOSE = 1e-3, 1e6
"""Electrons per pixel; float32 counts to 1.6e7."""


def in_range(
    code: str,
    name: str,
    value: int | float,
    low: int | float,
    high: int | float,
    unit: str = "",
    option: str = "",
) -> None:
    """Raise :class:`ConfigError` unless ``low <= value <= high`` (NaN is refused); ``option`` is named in the hint."""
    if not low <= value <= high:
        raise ConfigError(
            code,
            f"the {name} must be from {low:,.10g} to {high:,.10g}{unit}, found {value}",
            f"change {option}" if option else "",
        )


@dataclass(frozen=True)
class CTFSettings:
    """How the CTF of each particle is drawn.

    Attributes
    ----------
    defocus
        (lowest, highest) mean defocus in angstrom, uniform between, positive = underfocus.
    astigmatism
        Largest ``DefocusU - DefocusV`` in angstrom: uniform from 0, the angle uniform over half a turn.
    phase_shift
        Radian, the same for all particles.
    voltage, spherical_aberration, amplitude_contrast, bfactor
        kV, mm, fraction, angstrom^2.
    """

    defocus: tuple[float, float] = (8000.0, 20000.0)
    astigmatism: float = 0.0
    phase_shift: float = 0.0
    voltage: float = 300.0
    spherical_aberration: float = 2.7
    amplitude_contrast: float = 0.1
    bfactor: float = 0.0

    def __post_init__(self) -> None:
        for value in self.defocus:
            in_range("CONF320", "defocus", value, -MAX_DEFOCUS, MAX_DEFOCUS, " A", "--defocus")
        if self.defocus[0] > self.defocus[1]:
            raise ConfigError(
                "CONF320",
                f"the defocus range {self.defocus[0]:g} .. {self.defocus[1]:g} A is empty",
                "give the lower first",
            )
        in_range("CONF321", "astigmatism", self.astigmatism, 0, MAX_DEFOCUS, " A", "--astigmatism")
        in_range("CONF321", "phase shift", math.degrees(self.phase_shift), -360, 360, " degrees", "--phase-shift")
        in_range("CONF321", "voltage", self.voltage, 10, 2000, " kV", "--voltage")
        in_range("CONF321", "spherical aberration", self.spherical_aberration, -20, 20, " mm")
        in_range("CONF321", "amplitude contrast", self.amplitude_contrast, 0, 0.999)
        in_range("CONF321", "CTF B-factor", self.bfactor, -1000, 10_000, " A^2")

    def sample(self, count: int, generator: torch.Generator) -> CTFParams:
        """Parameters of ``count`` particles, float32."""
        mean, half, angle = torch.rand(3, count, generator=generator, dtype=torch.float64)
        mean = self.defocus[0] + mean * (self.defocus[1] - self.defocus[0])
        half = 0.5 * self.astigmatism * half

        def same(value: float) -> Tensor:
            return torch.full((count,), value)

        return CTFParams(
            (mean + half).to(torch.float32),
            (mean - half).to(torch.float32),
            (math.pi * angle).to(torch.float32),
            same(self.phase_shift),
            same(self.voltage),
            same(self.spherical_aberration),
            same(self.amplitude_contrast),
            same(self.bfactor),
            same(1.0),
        )


@dataclass(frozen=True)
class SimulationSettings:
    """What is drawn for each particle. See the module for the SNR; ``snr_db`` None means no noise.

    ``shift_sigma_px``: standard deviation in pixels of each coordinate of the Gaussian shift. ``noise``: white,
    coloured with the spectrum of :func:`cryorbit.physics.noise.coloured_spectrum`, or poisson: images are counts of
    electrons, ``dose`` of them in a pixel without a particle (and None for other noise). ``seed`` fixes every draw.
    """

    count: int
    snr_db: float | None = 0.0
    ctf: CTFSettings | None = None
    shift_sigma_px: float = 0.0
    orientations: Orientations = field(default_factory=Orientations)
    noise: Literal["white", "coloured", "poisson"] = "white"
    seed: int = 0
    dose: float | None = None

    def __post_init__(self) -> None:
        in_range("CONF330", "number of particles", self.count, 1, MAX_COUNT, "", "--count")
        if self.snr_db is not None:
            snr_from_db(self.snr_db)
        in_range("CONF332", "shifts' standard deviation", self.shift_sigma_px, 0, 1000, " px", "--shift-sigma")
        if self.noise not in ("white", "coloured", "poisson"):
            raise ConfigError("CONF333", f"noise is white, coloured or poisson, found {self.noise!r}")
        if (self.noise == "poisson") != (self.dose is not None) or (self.dose is not None and self.snr_db is None):
            raise ConfigError(
                "CONF340",
                f"{self.noise} noise, dose {self.dose}, SNR {self.snr_db} dB: counts have a dose and an SNR, other noise no dose",
                "give --noise poisson, --dose and --snr-db together, or leave --dose out",
            )
        if self.dose is not None:
            in_range("CONF340", "dose", self.dose, MIN_DOSE, MAX_DOSE, " electrons per pixel", "--dose")
        if self.seed < 0:
            raise ConfigError("CONF334", f"the seed must be zero or more, found {self.seed}")
