"""Values that no experiment has: a wrong unit, a shifted column or a damaged file. They make a set unusable."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cryorbit.errors import DataError
from cryorbit.io.particle_set import ParticleSet
from cryorbit.io.relion import CTF_LABELS

MIN_PIXEL_SIZE, MAX_PIXEL_SIZE = 0.01, 1000.0
MIN_BOX = 8
# CTFParams field: lowest, highest, unit, all as in the file. Both ends are allowed.
_LIMITS = {
    "voltage": (1.0, 2000.0, " kV"),
    "spherical_aberration": (-20.0, 20.0, " mm"),
    "amplitude_contrast": (0.0, 0.999999, ""),
    "defocus_u": (-1e6, 1e6, " A"),
    "defocus_v": (-1e6, 1e6, " A"),
    "defocus_angle": (-3600.0, 3600.0, " deg"),
    "phase_shift": (-3600.0, 3600.0, " deg"),
    "bfactor": (-1e5, 1e5, " A^2"),
    "scale": (1e-3, 1e6, ""),
}


def _error(bad: NDArray[np.bool_], values: NDArray[np.float64], what: str, expected: str, unit: str) -> DataError:
    row = int(np.flatnonzero(bad)[0])
    more = int(bad.sum()) - 1
    others = f" ({more} more row(s) are out of range)" if more else ""
    return DataError(
        "DATA030",
        f"row {row + 1}: the {what} is {values[row]:.6g}{unit}, expected {expected}{unit}{others}",
        "check the unit and the column; drop or correct these rows",
    )


def implausible(particles: ParticleSet) -> Iterator[DataError]:
    """One ``DATA030`` for each quantity with values that cannot be: the first such row, its value, what was expected.

    Box 8 px or more; pixel size 0.01 to 1000 A; voltage 1 to 2000 kV; Cs within 20 mm; amplitude contrast in [0, 1);
    defocus within 1e6 A; its angle and the phase shift within ten turns; B-factor within 1e5 A^2; scale 0.001 to 1e6;
    shifts in x and in y no longer than the box.
    """
    if 0 < particles.box < MIN_BOX:
        yield DataError(
            "DATA030",
            f"the images are {particles.box} px wide, expected at least {MIN_BOX} px",
            "extract the particles in a larger box, or bin them less",
        )
        return
    if not MIN_PIXEL_SIZE <= particles.pixel_size <= MAX_PIXEL_SIZE:
        yield DataError(
            "DATA030",
            f"the pixel size is {particles.pixel_size:.6g} A, expected {MIN_PIXEL_SIZE:g} to {MAX_PIXEL_SIZE:g} A",
            "give it with --pixel-size (angstrom)",
        )
        return
    for name, (low, high, unit) in _LIMITS.items():
        if particles.ctf is None:
            break
        label, factor, _ = CTF_LABELS[name]
        values = particles.ctf[name] / factor
        bad = ~((values >= low) & (values <= high))
        if bad.any():
            yield _error(bad, values, f"{name.replace('_', ' ')} ({label})", f"{low:g} to {high:g}", unit)
    if particles.shifts is not None and particles.box:
        farthest = np.abs(particles.shifts).max(axis=1) / particles.pixel_size
        bad = ~(farthest <= particles.box)
        if bad.any():
            yield _error(bad, farthest, "origin (shift in x or y)", f"at most the box of {particles.box}", " px")
