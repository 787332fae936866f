"""The picture of ``cryorbit align2d``: class averages by size, each with its number of particles and resolution."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cryorbit.report.style import DENSITY, bare, figure, png, write_bytes

_COLUMNS = 10


def gallery(
    pictures: Float[np.ndarray, "k d d"], sizes: list[int], resolution: list[float | None], pixel_size: float
) -> bytes:
    """PNG of the averages that have particles, in the order given.

    Parameters
    ----------
    pictures
        (K, D, D) averages; each is shown on its own grey scale.
    sizes, resolution
        Particles of each class, and angstrom, None where its halves never agree.
    pixel_size
        Angstrom per pixel, for the side length stated below.
    """
    shown = [k for k, size in enumerate(sizes) if size]
    columns = min(_COLUMNS, max(3, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    made = figure(1.15 * columns, 1.42 * rows + 0.25)
    for place, axes in enumerate(made.subplots(rows, columns, squeeze=False).flat):
        bare(axes)
        if place < len(shown):
            k = shown[place]
            reached = "no agreement" if resolution[k] is None else f"{resolution[k]:.1f} Å"
            axes.imshow(pictures[k], cmap=DENSITY, origin="lower", interpolation="nearest")
            bare(axes, f"{k + 1}: {sizes[k]:,}\n{reached}", 7.0)
    made.supxlabel(
        f"class: particles, resolution (FRC 0.143 of half averages); side {pictures.shape[-1] * pixel_size:.0f} Å",
        fontsize=8,
    )
    return png(made)


def write_gallery(
    path: Path,
    pictures: Float[np.ndarray, "k d d"],
    sizes: list[int],
    resolution: list[float | None],
    pixel_size: float,
) -> Path:
    """Write :func:`gallery` to ``path``."""
    write_bytes(path, gallery(pictures, sizes, resolution, pixel_size))
    return path
