"""cryoDRGN's poses and CTF, attached to a particle set."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cryorbit.errors import DataError
from cryorbit.io import relion
from cryorbit.io.cryodrgn import read_cryodrgn_ctf, read_cryodrgn_poses
from cryorbit.io.particle_set import ParticleSet, from_tables
from cryorbit.io.star import StarFile


def with_ctf(particles: ParticleSet, ctf: Mapping[str, Float[np.ndarray, " n"]], pixel_size: float) -> ParticleSet:
    """The same particles with this CTF (CTFParams fields, our units) and pixel size (A); the old optics table goes."""
    columns = {
        relion.CTF_LABELS[field][0]: relion.texts(values / relion.CTF_LABELS[field][1]) for field, values in ctf.items()
    }
    columns[relion.PIXEL_SIZE] = [f"{pixel_size:.6f}"] * len(particles)
    table = particles.table.with_columns(columns)
    optics, columns[relion.GROUP] = relion.make_optics(table)
    table = table.with_columns({relion.GROUP: columns[relion.GROUP]}, drop=relion.OPTICS_LABELS)
    kept = {name: block for name, block in particles.star.blocks.items() if name not in ("optics", particles.block)}
    star = StarFile({"optics": optics, particles.block: table} | kept)
    found = from_tables(star, particles.path, particles.images, warnings=particles.warnings)
    return replace(found, sign=particles.sign)


def attach_cryodrgn(
    particles: ParticleSet, poses: Path | str | None = None, ctf: Path | str | None = None
) -> ParticleSet:
    """Particles with the poses and CTF of cryoDRGN's pickles.

    Parameters
    ----------
    particles
        N particles, their images opened.
    poses
        ``poses.pkl``; its translations are fractions of the box.
    ctf
        ``ctf.pkl``; its pixel size holds at its own box, so particles of another box were scaled: size x box in file
        / box here.

    Raises
    ------
    FileError, DataError
        ``PKL001`` to ``PKL003``; ``PKL004``: another number of particles.
    """

    def check(count: int, path: Path | str) -> None:
        if count != len(particles):
            raise DataError(
                "PKL004", f"{Path(path).name} holds {count} rows, {particles.path.name} has {len(particles)} particles"
            )

    if ctf is not None:
        fields, box, pixel_size = read_cryodrgn_ctf(ctf)
        check(len(fields["voltage"]), ctf)
        particles = with_ctf(particles, fields, pixel_size * box / (particles.box or box))
    if poses is not None:
        rotations, shifts = read_cryodrgn_poses(poses, particles.box, particles.pixel_size)
        check(len(rotations), poses)
        columns = relion.pose_columns(rotations, shifts)
        table = particles.table.with_columns(columns, drop=relion.ORIGIN_PX)
        kept: NDArray[np.float64] | None = particles.shifts if shifts is None else shifts
        star = StarFile(particles.star.blocks | {particles.block: table})
        particles = replace(particles, star=star, table=table, rotations=rotations, shifts=kept)
    return particles
