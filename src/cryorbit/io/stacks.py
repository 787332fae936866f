"""Images of one data set, scattered over any number of stacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy.typing import ArrayLike, NDArray

from cryorbit.errors import DataError, FileError
from cryorbit.io.mrc import MrcStack

_NAMED = 8
_MOST_DIGITS = 18


def split_image_name(name: str) -> tuple[int, str]:
    """0-based image number and stack path of ``000012@path`` (a bare path is its first image).

    Raises
    ------
    DataError
        ``DATA020``: the part before ``@`` is no positive whole number.
    """
    number, at, path = name.partition("@")
    if not at:
        return 0, name
    whole = number.isascii() and number.isdecimal() and len(number) <= _MOST_DIGITS
    if not whole or int(number) < 1 or not path:
        raise DataError("DATA020", f'image name "{name}" is not of the form 000001@stack.mrcs, counted from 1')
    return int(number) - 1, path


def _candidates(name: str, folder: Path, datadir: Path | None) -> list[Path]:
    path = Path(name)
    places = [datadir / path.relative_to(path.anchor), datadir / path.name] if datadir else []
    if path.is_absolute():
        return [path, *places]
    return [*places, *(parent / path for parent in (folder, *folder.parents)), Path.cwd() / path]


def find_files(names: Sequence[str], folder: Path, datadir: Path | None = None) -> dict[str, Path]:
    """Where each of ``names`` lies.

    A relative name is looked for below ``datadir`` (also by its last part alone), then below ``folder`` and each of
    its parents (so a path relative to the project root is found from anywhere inside the project), then below the
    working directory.

    Parameters
    ----------
    names
        Paths as the metadata file has them.
    folder
        Folder of the metadata file.
    datadir
        Where the user says the images are.

    Raises
    ------
    FileError
        ``FILE010``: one error for all the files that are missing.
    """
    folder = folder.resolve()
    if datadir is not None and not datadir.is_dir():
        raise FileError("FILE011", f"the data folder {datadir} does not exist")
    found: dict[str, Path] = {}
    missing: list[str] = []
    for name in names:
        place = next((path for path in _candidates(name, folder, datadir) if path.is_file()), None)
        if place is None:
            missing.append(name)
        else:
            found[name] = place
    if missing:
        listed = "".join(f"\n  {name}" for name in missing[:_NAMED])
        more = f"\n  ... and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        looked = f"{datadir}, " if datadir else ""
        raise FileError(
            "FILE010",
            f"{len(missing)} of {len(names)} image stack(s) not found:{listed}{more}",
            f"looked below {looked}{folder}, its parent folders and the working directory; name their folder "
            "with --datadir",
        )
    return found


@dataclass(frozen=True)
class StackImages:
    """N images: image ``n`` is number ``image_index[n]`` (0-based) of ``stacks[stack_index[n]]``."""

    stacks: tuple[MrcStack, ...]
    stack_index: NDArray[np.int64]
    image_index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.stack_index)

    @property
    def box(self) -> int:
        """Side of the images in pixels."""
        return self.stacks[0].box

    def subset(self, indices: ArrayLike) -> "StackImages":
        """The images at ``indices``, in that order."""
        index = np.asarray(indices)
        return StackImages(self.stacks, self.stack_index[index], self.image_index[index])

    def read(self, indices: ArrayLike, *, check: bool = True) -> Float32[np.ndarray, "m d d"]:
        """Images at ``indices`` as (m, D, D) float32; errors as ``MrcStack.read``."""
        chosen = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        images = np.empty((len(chosen), self.box, self.box), np.float32)
        stack_of = self.stack_index[chosen]
        for number in np.unique(stack_of):
            here = np.flatnonzero(stack_of == number)
            images[here] = self.stacks[number].read(self.image_index[chosen[here]], check=check)
        return images


def open_images(image_names: Sequence[str], folder: Path, datadir: Path | None = None) -> StackImages:
    """Find and open the stacks behind RELION image names.

    Parameters
    ----------
    image_names
        ``000001@stack.mrcs`` for each particle.
    folder, datadir
        As ``find_files``.

    Raises
    ------
    FileError
        Missing or damaged stacks.
    DataError
        ``DATA020`` malformed name, ``DATA021`` stacks of different box, ``DATA022`` image numbers beyond a stack's end.
    """
    pairs = [split_image_name(name) for name in image_names]
    names = list(dict.fromkeys(path for _, path in pairs))
    places = find_files(names, folder, datadir)
    stacks = tuple(MrcStack(places[name]) for name in names)
    boxes = {stack.box: stack.path.name for stack in stacks}
    if len(boxes) > 1:
        listed = ", ".join(f"{box} px ({name})" for box, name in boxes.items())
        raise DataError(
            "DATA021",
            f"the stacks have different box sizes: {listed}; expected one",
            "rescale or re-extract to one box",
        )
    number = {name: i for i, name in enumerate(names)}
    images = StackImages(stacks, np.array([number[path] for _, path in pairs]), np.array([index for index, _ in pairs]))
    counts = np.array([stack.count for stack in stacks])
    beyond = np.flatnonzero(images.image_index >= counts[images.stack_index])
    if beyond.size:
        worst = beyond[0]
        stack = stacks[images.stack_index[worst]]
        raise DataError(
            "DATA022",
            f"{beyond.size} image number(s) lie beyond the end of their stack: {image_names[worst]}, but "
            f"{stack.path.name} holds {stack.count}",
            "the stack and the metadata do not belong together, or the stack was cut",
        )
    return images
