"""One data set of particles: metadata, poses, CTF, and images read on demand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy.typing import ArrayLike, NDArray

from cryorbit.errors import DataError, FileError
from cryorbit.io import relion
from cryorbit.io.stacks import StackImages, split_image_name
from cryorbit.io.star import StarFile, StarTable

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
            ``DATA012`` NaN images, ``DATA014`` too large values (named); ``DATA023`` the set was opened without its images.
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


def duplicate_groups(particles: ParticleSet) -> NDArray[np.int64]:
    """(N,) numbers from 0, the same for rows that are the same image: the same number in the same stack file.

    Stacks are the same where their paths lead to one file; in a set opened without images, where their names are equal.
    """
    images = particles.images
    if images is None:
        number: dict[tuple[int, str], int] = {}
        names = particles.table.columns[relion.IMAGE]
        return np.array([number.setdefault(split_image_name(name), len(number)) for name in names], dtype=np.int64)
    files: dict[Path, int] = {}
    stack = np.array([files.setdefault(stack.path.resolve(), len(files)) for stack in images.stacks], dtype=np.int64)
    longest = max(each.count for each in images.stacks)
    _, group = np.unique(stack[images.stack_index] * longest + images.image_index, return_inverse=True)
    return group.astype(np.int64)


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
        if sign == -1:
            raise DataError(
                "DATA029",
                f"{path.name} marks its images as dark already",
                "leave --invert-contrast out: they would be inverted twice",
            )
        sign = -1
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
