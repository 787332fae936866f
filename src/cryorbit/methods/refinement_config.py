"""Settings of the refinement."""

from dataclasses import dataclass


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
    """

    sweeps: int = 8
    batch: int = 500
    iterations: int = 6
    modes: int = 3
    samples: int = 12
    radius_growth: float = 1.5
    fsc_radius: float = 0.2
    fit_shift: bool = True
    search_order: int = 2
    search_every: int = 2
