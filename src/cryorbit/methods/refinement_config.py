"""Settings of the refinement."""

from dataclasses import dataclass

from cryorbit.errors import ConfigError

VOLUME_NAMES = ("voxel", "neural")
"""What a map can be made of (``methods/map_models.py``)."""


def checked_volume(name: str) -> str:
    """``name`` if it is one of :data:`VOLUME_NAMES`."""
    if name not in VOLUME_NAMES:
        raise ConfigError("CONF031", f"unknown volume {name}", f"known volumes: {', '.join(VOLUME_NAMES)}")
    return name


@dataclass(frozen=True)
class RefinementConfig:
    """Settings of the refinement.

    Attributes
    ----------
    sweeps
        Most passes over the particles.
    batch
        Particles at a time.
    iterations
        Gauss-Newton steps per mode and sweep.
    modes
        Modes of a particle's posterior that are followed.
    samples
        Poses drawn around each mode that is wider than a quarter of a Fourier pixel's reach.
    radius_growth
        Largest factor between the radii of successive sweeps.
    fsc_radius
        The radius reaches to the last shell where the halves correlate by this much, plus two.
    fit_shift
        Whether shifts are refined.
    search_order, search_every
        Every so many sweeps (0, or shifts fixed: never) each particle is scored against a whole grid of rotations of this HEALPix order,
        and its best pose there becomes another mode where it is not near one.
    defocus_range
        Angstrom within which each particle's defocus is searched around that of the file; 0 keeps it.
    field_width, field_steps
        Of a neural map: hidden units per layer, and gradient steps per sweep.
    """

    sweeps: int = 16
    batch: int = 500
    iterations: int = 6
    modes: int = 3
    samples: int = 12
    radius_growth: float = 1.5
    fsc_radius: float = 0.2
    fit_shift: bool = True
    search_order: int = 2
    search_every: int = 2
    defocus_range: float = 0.0
    field_width: int = 128
    field_steps: int = 60

    def most(self, radius: int) -> int:
        """Largest radius of the sweep after one at ``radius``."""
        return int(radius * self.radius_growth)
