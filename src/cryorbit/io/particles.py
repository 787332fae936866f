"""Particle files in and out.

``open_particles`` takes any file a microscopist has (STAR, ``.mrcs``, a text list of stacks, cryoSPARC's ``.cs``); everything becomes
RELION's tables first, so there is one way in and nothing the input said is lost on the way out (``write_particles``).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from cryorbit.errors import ConfigError, FileError
from cryorbit.io import relion
from cryorbit.io.cs import cs_to_star
from cryorbit.io.mrc import MrcStack, refuse_other_formats
from cryorbit.io.particle_set import ParticleSet, from_tables
from cryorbit.io.stacks import find_files, open_images
from cryorbit.io.star import StarFile, StarTable, read_star, write_star


def _bare_stacks(path: Path, datadir: Path | None) -> StarFile:
    """RELION's table for one stack, or for a text file that lists stacks, one path a line."""
    places = {path.name: path}
    if path.suffix.lower() == ".txt":
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise FileError(
                "FILE012", f"{path.name} is no list of stacks: byte {error.start} is not UTF-8 text"
            ) from error
        wide = next((i for i, name in enumerate(names, 1) if "\t" in name), None)
        if wide or not names:
            found = f"line {wide} has columns" if wide else "it is empty"
            raise FileError("FILE012", f"{path.name} is no list of stacks: {found}; expected one path per line")
        places = find_files(list(dict.fromkeys(names)), path.parent, datadir)
    counts = {name: MrcStack(place).count for name, place in places.items()}
    images = [f"{i:06d}@{name}" for name, count in counts.items() for i in range(1, count + 1)]
    return StarFile({"particles": StarTable({relion.IMAGE: images})})


def _load(path: Path, datadir: Path | None, passthrough: Path | str | None) -> tuple[StarFile, tuple[str, ...]]:
    refuse_other_formats(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileError("FILE001", f"{path} does not exist")
    if passthrough is not None and suffix != ".cs":
        raise ConfigError("CONF051", f"a passthrough file belongs to a .cs file, not to {path.name}")
    if suffix == ".star":
        return read_star(path), ()
    if suffix == ".cs":
        return cs_to_star(path, passthrough)
    if suffix in (".mrcs", ".mrc", ".txt"):
        return _bare_stacks(path, datadir), ()
    raise FileError(
        "FILE003", f"{path.name} is no particle file; expected .star, .cs, .mrcs, .mrc or a .txt list of stacks"
    )


def open_particles(
    path: Path | str,
    datadir: Path | str | None = None,
    *,
    pixel_size: float | None = None,
    invert_contrast: bool = False,
    require_images: bool = True,
    ctf_given: Mapping[str, float] | None = None,
    passthrough: Path | str | None = None,
) -> ParticleSet:
    """Open a particle set; images stay on disk until ``read``.

    Parameters
    ----------
    path
        ``.star`` (RELION 1 to 5, cryoSPARC exports, Warp, M, Scipion), ``.cs``, ``.mrcs``/``.mrc`` stack, or ``.txt``
        list of stacks.
    datadir
        Folder of the image stacks, where the file's own paths do not lead there.
    pixel_size
        Angstrom; overrides the file.
    invert_contrast
        The protein is dark in these images: multiply them by -1.
    require_images
        False reads the metadata alone (poses to compare with, for example).
    ctf_given
        CTFParams fields for columns the file lacks, for example ``{"amplitude_contrast": 0.1}``.
    passthrough
        cryoSPARC's passthrough file, joined to a ``.cs`` file by uid.

    Raises
    ------
    FileError, DataError
        Anything that cannot be used; see the codes in ``docs/files.md``.
    """
    unknown = sorted(set(ctf_given or {}) - set(relion.CTF_LABELS))
    if unknown:
        raise ConfigError("CONF050", f"unknown CTF field {unknown[0]}; expected one of {', '.join(relion.CTF_LABELS)}")
    path = Path(path)
    folder = Path(datadir) if datadir else None
    star, warnings = _load(path, folder, passthrough)
    block = relion.find_particle_block(star, path.name)
    table = relion.with_given_ctf(star.blocks[block], star.blocks.get("optics"), ctf_given or {})
    star = StarFile(star.blocks | {block: table})
    images = open_images(table.columns[relion.IMAGE], path.parent, folder) if require_images else None
    return from_tables(star, path, images, pixel_size=pixel_size, sign=-1 if invert_contrast else 1, warnings=warnings)


def new_particles(
    image_names: Sequence[str],
    pixel_size: float,
    box: int,
    ctf: Mapping[str, ArrayLike | float] | None = None,
    rotations: Float[np.ndarray, "n 3 3"] | None = None,
    shifts: Float[np.ndarray, "n 2"] | None = None,
    half_set: Int[np.ndarray, " n"] | None = None,
    extra: Mapping[str, Sequence[str]] | None = None,
) -> ParticleSet:
    """A particle set from numbers, to be written with ``write_particles`` (it has no images to read).

    Parameters
    ----------
    image_names
        ``000001@stack.mrcs``, relative to where the STAR file will be.
    pixel_size, box
        Angstrom per pixel; side in pixels.
    ctf
        CTFParams fields in our units, arrays of length N or single values.
    rotations, shifts, half_set
        As in ``ParticleSet``.
    extra
        More columns by label.
    """
    count = len(image_names)
    columns: dict[str, list[str]] = {relion.IMAGE: list(image_names)}
    for field, values in (ctf or {}).items():
        label, factor, _ = relion.CTF_LABELS[field]
        columns[label] = relion.texts(np.broadcast_to(np.asarray(values, dtype=np.float64) / factor, (count,)))
    table = StarTable(columns)
    optics, group = relion.make_optics(table)
    optics = optics.with_columns(
        {relion.PIXEL_SIZE: [f"{pixel_size:.6f}"] * len(optics), relion.BOX: [str(box)] * len(optics)}
    )
    columns = {relion.GROUP: group} | relion.pose_columns(rotations, shifts)
    if half_set is not None:
        columns[relion.SUBSET] = [str(int(half)) for half in half_set]
    table = table.with_columns(columns | {k: list(v) for k, v in (extra or {}).items()}, drop=relion.OPTICS_LABELS)
    star = StarFile({"optics": optics, "particles": table})
    return from_tables(star, Path("particles.star"), None)


def _image_names(particles: ParticleSet, folder: Path) -> list[str]:
    images = particles.images
    if images is None:
        return particles.table.columns[relion.IMAGE]
    places = [os.path.abspath(stack.path) for stack in images.stacks]
    base = os.path.abspath(folder)
    names = places if base == Path(base).anchor else [os.path.relpath(place, base) for place in places]
    return [
        f"{i + 1:06d}@{names[s]}" for s, i in zip(images.stack_index.tolist(), images.image_index.tolist(), strict=True)
    ]


def write_particles(
    path: Path | str,
    particles: ParticleSet,
    *,
    rotations: Float[np.ndarray, "n 3 3"] | None = None,
    shifts: Float[np.ndarray, "n 2"] | None = None,
    half_set: Int[np.ndarray, " n"] | None = None,
    extra: Mapping[str, Sequence[str]] | None = None,
    relative_to: Path | str | None = None,
) -> None:
    """Write a RELION 3.1+ STAR file (optics and particles) that RELION can refine from; all that the input had is kept.

    Parameters
    ----------
    path
        Final name, written atomically.
    particles
        The set; its own poses and half sets stay where no new ones are given.
    rotations, shifts, half_set
        New poses: (N, 3, 3); (N, 2) in angstrom; 1 or 2.
    extra
        More columns by label; they replace columns of the same label.
    relative_to
        Folder that image paths are relative to: the STAR's own by default; for RELION its project folder, where its
        programs run; the root of the file system for absolute paths.
    """
    path = Path(path)
    table, optics = particles.table, particles.optics
    columns = {relion.IMAGE: _image_names(particles, Path(relative_to) if relative_to else path.parent)}
    if optics is None:
        optics, columns[relion.GROUP] = relion.make_optics(table)
    else:
        optics = relion.complete_optics(optics, table, particles.optics_group)
        columns[relion.GROUP] = [str(group) for group in particles.optics_group.tolist()]
    stated = {"rlnImageDimensionality": "2"} | ({relion.BOX: str(particles.box)} if particles.box else {})
    optics = optics.with_columns({label: [value] * len(optics) for label, value in stated.items()})
    sizes = relion.pixel_sizes(table, particles.optics, particles.optics_group)
    if relion.PIXEL_SIZE not in optics or sizes is None or abs(sizes[0] - particles.pixel_size) > 1e-6:
        optics = optics.with_columns({relion.PIXEL_SIZE: [f"{particles.pixel_size:.6f}"] * len(optics)})
    if shifts is None and relion.ORIGIN_ANGST[0] not in table:
        shifts = particles.shifts
    columns |= relion.pose_columns(rotations, shifts)
    if half_set is not None:
        columns[relion.SUBSET] = [str(int(half)) for half in half_set]
    if particles.sign == -1:
        columns[relion.SIGN] = ["-1"] * len(table)
    table = table.with_columns(columns | {k: list(v) for k, v in (extra or {}).items()}, drop=relion.ORIGIN_PX)
    others = {name: block for name, block in particles.star.blocks.items() if name not in ("optics", particles.block)}
    write_star(path, StarFile({"optics": replace(optics, is_loop=True), "particles": table} | others))
