"""One data set of particles: metadata, poses, CTF, and images read on demand.

``open_particles`` takes any file a microscopist has (STAR, ``.mrcs``, a text list of stacks, cryoSPARC's ``.cs``);
everything becomes RELION's tables first, so there is one way in and nothing the input said is lost on the way out
(``write_particles``).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int
from numpy.typing import ArrayLike, NDArray

from cryorbit.errors import ConfigError, DataError, FileError
from cryorbit.io import relion
from cryorbit.io.cs import cs_to_star
from cryorbit.io.mrc import MrcStack, refuse_other_formats
from cryorbit.io.stacks import StackImages, find_files, open_images
from cryorbit.io.star import StarFile, StarTable, read_star, write_star

_SAME_PIXEL = 1e-3


@dataclass(frozen=True)
class ParticleSet:
    """N particles. Arrays are float64 or int64, one entry per particle; None where the file does not say.

    ``box`` px; ``pixel_size`` angstrom; ``ctf`` CTFParams field -> (N,), with ``ctf_missing`` the labels for want of
    which it is None;
    ``rotations`` (N, 3, 3) and ``shifts`` (N, 2) angstrom as ``types.Poses``; ``half_set`` 1 or 2; ``sign`` -1 where
    the images are stored with dark protein (``read`` multiplies it in); ``table`` and ``star`` the input's own
    columns and blocks; ``images`` None where the stacks were not asked for; ``warnings`` what a reader should know.
    """

    path: Path
    star: StarFile
    block: str
    table: StarTable
    box: int
    pixel_size: float
    optics_group: NDArray[np.int64]
    ctf: dict[str, NDArray[np.float64]] | None
    ctf_missing: tuple[str, ...]
    rotations: NDArray[np.float64] | None
    shifts: NDArray[np.float64] | None
    half_set: NDArray[np.int64] | None
    images: StackImages | None
    sign: int = 1
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.optics_group)

    @property
    def optics(self) -> StarTable | None:
        """The optics table, where the input has one."""
        return self.star.blocks.get("optics")

    def read(self, indices: ArrayLike) -> Float32[np.ndarray, "m d d"]:
        """Images at ``indices`` as (m, D, D) float32, protein bright.

        Raises
        ------
        DataError
            ``DATA012`` NaN images (named); ``DATA023`` the set was opened without its images.
        """
        if self.images is None:
            raise DataError("DATA023", f"{self.path.name} was opened without its images")
        images = self.images.read(indices)
        return images if self.sign == 1 else np.negative(images, out=images)

    def subset(self, indices: ArrayLike) -> "ParticleSet":
        """The particles at ``indices`` (whole numbers or a mask), in that order."""
        index = np.arange(len(self))[np.asarray(indices)]

        def pick(values: NDArray | None) -> NDArray | None:
            return None if values is None else values[index]

        return replace(
            self,
            table=self.table.rows(index.tolist()),
            optics_group=self.optics_group[index],
            ctf=None if self.ctf is None else {name: values[index] for name, values in self.ctf.items()},
            rotations=pick(self.rotations),
            shifts=pick(self.shifts),
            half_set=pick(self.half_set),
            images=None if self.images is None else self.images.subset(index),
        )


def _bare_stacks(path: Path, datadir: Path | None) -> StarFile:
    """RELION's table for one stack, or for a text file that lists stacks, one path a line."""
    places = {path.name: path}
    if path.suffix.lower() == ".txt":
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
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
        raise ConfigError("CONF011", f"a passthrough file belongs to a .cs file, not to {path.name}")
    if suffix == ".star":
        return read_star(path), ()
    if suffix == ".cs":
        return cs_to_star(path, passthrough)
    if suffix in (".mrcs", ".mrc", ".txt"):
        return _bare_stacks(path, datadir), ()
    raise FileError(
        "FILE003", f"{path.name} is no particle file; expected .star, .cs, .mrcs, .mrc or a .txt list of stacks"
    )


def _stated_pixel_size(sizes: NDArray[np.float64] | None, name: str, strict: bool) -> float | None:
    if sizes is None:
        return None
    low, high = float(sizes.min()), float(sizes.max())
    if low <= 0 or (strict and high - low > _SAME_PIXEL * low):
        raise DataError(
            "DATA024",
            f"the images of {name} have pixel sizes from {low:.4f} to {high:.4f} A; expected one positive value",
            "rescale them to one pixel size, or name the one to use with --pixel-size",
        )
    return float(sizes[0])


def _refuse_unusable(table: StarTable, optics: StarTable | None, group: NDArray[np.int64], name: str) -> None:
    premultiplied = relion.per_particle(table, optics, group, "rlnCtfDataAreCtfPremultiplied")
    if premultiplied is not None and (premultiplied != 0).any():
        raise DataError(
            "DATA025",
            f"the images of {name} are multiplied by their CTF",
            "extract them again without premultiplication",
        )
    dimension = relion.per_particle(table, optics, group, "rlnImageDimensionality")
    if dimension is not None and (dimension != 2).any():
        raise DataError("DATA026", f"{name} lists subtomograms (rlnImageDimensionality 3); expected 2-D images")


def _box(sizes: NDArray[np.float64] | None, images: StackImages | None, warnings: list[str]) -> int:
    if images is None:
        if sizes is None:
            warnings.append("the box size is not stated")
        return 0 if sizes is None else int(sizes[0])
    if sizes is not None and (sizes != images.box).any():
        warnings.append(
            f"{relion.BOX} says {sizes.min():.0f} to {sizes.max():.0f} px, the images have {images.box}: they are right"
        )
    return images.box


def from_tables(
    star: StarFile,
    path: Path,
    images: StackImages | None,
    *,
    pixel_size: float | None = None,
    sign: int = 1,
    warnings: Sequence[str] = (),
) -> ParticleSet:
    """A particle set from RELION's tables and opened images (None: metadata alone); arguments as ``open_particles``."""
    block = relion.find_particle_block(star, path.name)
    table, optics = star.blocks[block], star.blocks.get("optics")
    if optics is None and relion.GROUP in table and relion.PIXEL_SIZE not in table and pixel_size is None:
        raise FileError(
            "STAR013",
            f"the particles of {path.name} name optics groups, but the file has no optics table",
            "use the file that has it; or give the pixel size to go on without CTF",
        )
    group = relion.optics_groups(optics, table, path.name)
    notes = list(warnings)
    if images is not None:
        _refuse_unusable(table, optics, group, path.name)
    sizes = relion.pixel_sizes(table, optics, group)
    stated = _stated_pixel_size(sizes, path.name, images is not None and pixel_size is None)
    header = images.stacks[0].pixel_size if images else 0.0
    chosen = pixel_size or stated or header
    if not chosen > 0:
        raise DataError(
            "DATA027", f"neither {path.name} nor its stacks say the pixel size", "give it with --pixel-size (angstrom)"
        )
    if stated is not None and header > 0 and abs(header - stated) > 0.01 * stated:
        notes.append(f"the MRC header says {header:.4g} A per pixel, the metadata {stated:.4g} A: the metadata is used")
    if pixel_size is not None and sizes is not None and np.abs(sizes - pixel_size).max() > _SAME_PIXEL * pixel_size:
        notes.append(
            f"the metadata says {sizes.min():.4g} to {sizes.max():.4g} A per pixel: the {pixel_size:.4g} A "
            "given are used"
        )
    elif sizes is not None and np.ptp(sizes) > _SAME_PIXEL * sizes.min():
        notes.append(f"pixel sizes go from {sizes.min():.4g} to {sizes.max():.4g} A; images are read only at one")
    box = _box(relion.per_particle(table, optics, group, relion.BOX), images, notes)
    bfactor = relion.per_particle(table, optics, group, relion.CTF_LABELS["bfactor"][0])
    if bfactor is not None and (bfactor <= 0).all() and (bfactor < 0).any():
        notes.append("the CTF B-factors are negative, as Warp and M write a fall-off: their absolute values are used")
    fields, missing = relion.ctf_columns(table, optics, group)
    rotations, shifts = relion.poses(table, chosen)
    stored = relion.numbers(table, relion.SIGN)
    if stored is not None and (stored < 0).all():
        sign = -sign
    half_set = relion.half_sets(table)
    if half_set is None and relion.SUBSET in table:
        notes.append(f"{relion.SUBSET} holds values other than 1 and 2: it is not used")
    return ParticleSet(
        path,
        star,
        block,
        table,
        box,
        chosen,
        group,
        fields,
        missing,
        rotations,
        shifts,
        half_set,
        images,
        sign,
        tuple(notes),
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
        raise ConfigError("CONF010", f"unknown CTF field {unknown[0]}; expected one of {', '.join(relion.CTF_LABELS)}")
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
    names = [os.path.relpath(stack.path.resolve(), folder.resolve()) for stack in images.stacks]
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
        Folder that image paths are relative to: the STAR's own by default, the project folder for RELION jobs run
        from there.
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
