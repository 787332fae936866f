"""Particles chosen by what ``align2d`` said of them: class and junk score."""

import math
from pathlib import Path

import numpy as np

from cryorbit.conventions import PARTICLE_COLUMNS
from cryorbit.errors import ConfigError, DataError, RunError
from cryorbit.io.particle_set import ParticleSet
from cryorbit.io.particles import open_particles, write_particles
from cryorbit.io.relion import numbers
from cryorbit.pipeline.outputs import project_folder


def select(
    source: Path,
    output: Path,
    *,
    classes: list[int],
    keep: float | None = None,
    max_junk: float | None = None,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Write the rows of ``source`` that are in ``classes`` (all when empty) and junk enough of which is left out.

    Parameters
    ----------
    source
        ``particles.star`` of ``align2d``.
    output
        STAR file to write; every column is kept.
    classes
        Class numbers, from 1 on.
    keep
        Fraction of the particles of these classes, those of the lowest score; None goes by ``max_junk``.
    max_junk
        Largest score kept, nats; 0 unless said otherwise.
    overwrite
        Replace ``output``.

    Returns
    -------
    How many were kept, of how many.

    Raises
    ------
    ConfigError
        CONF421 a fraction that is none, or one and a score at once; CONF422 a class that no particle has.
    DataError
        DATA420 the file was not written by ``align2d``; DATA421 nothing is left.
    RunError
        RUN047 the output exists, or is the input.
    """
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError("CONF421", f"--keep is {keep}, expected a fraction above 0 and at most 1")
    if max_junk is not None and math.isnan(max_junk):
        raise ConfigError("CONF421", f"--max-junk is {max_junk}, expected a number of nats")
    if keep is not None and max_junk is not None:
        raise ConfigError("CONF421", "--keep and --max-junk each choose by junk score", "give one of them")
    if output.exists() and output.resolve() == source.resolve():
        raise RunError("RUN047", f"{output} is the input", "give another --output")
    if output.exists() and not overwrite:
        raise RunError("RUN047", f"{output} exists already", "give another --output, or --overwrite")
    if output.suffix.lower() != ".star":
        raise RunError("RUN047", f"{output} is no STAR file", "give an --output that ends in .star")
    particles = open_particles(source, require_images=False)
    number, junk = (_column(particles, name) for name in ("class_number", "junk"))
    unknown = sorted(set(classes) - set(number.astype(int).tolist()))
    if unknown:
        raise ConfigError("CONF422", f"no particle of {source} is in class {unknown[0]}", "see classes.csv of the run")
    inside = np.isin(number, classes) if classes else np.ones(len(number), dtype=bool)
    if keep is not None:
        ranked = np.flatnonzero(inside)[np.argsort(junk[inside], kind="stable")]
        chosen = np.sort(ranked[: round(keep * len(ranked))])
    else:
        chosen = np.flatnonzero(inside & (junk <= (max_junk or 0.0)))
    if not len(chosen):
        raise DataError("DATA421", "no particle is left", "raise --max-junk or --keep, or name more classes")
    write_particles(output, particles.subset(chosen), relative_to=project_folder(output.parent))
    return len(chosen), len(particles)


def _column(particles: ParticleSet, name: str) -> np.ndarray:
    values = numbers(particles.table, PARTICLE_COLUMNS[name])
    if values is None:
        raise DataError(
            "DATA420",
            f"{particles.path} has no column {PARTICLE_COLUMNS[name]}",
            "give the particles.star that `cryorbit align2d` wrote",
        )
    return values
