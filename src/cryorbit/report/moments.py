"""The picture of ``cryorbit moments``: the map, how its halves agree, and where the views lie."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from cryorbit.report.figures import overview_figure
from cryorbit.report.style import png, write_bytes

_DRAWN = 20_000


def write_moments_figure(
    path: Path,
    volume: Float[np.ndarray, "d d d"],
    pixel_size: float,
    curve: Float[np.ndarray, " shells"],
    directions: Float[np.ndarray, "v 3"],
    density: Float[np.ndarray, " v"],
) -> Path:
    """Write the PNG of a map, the FSC of its halves' maps from shell 0 on, and the density over a grid of view directions."""
    frequency = np.arange(len(curve)) / (volume.shape[0] * pixel_size)
    curves = {"spatial_frequency_1_per_A": frequency, "fsc": np.asarray(curve, dtype=np.float64)}
    seen = np.repeat(directions, np.round(_DRAWN * density).astype(int), axis=0)
    cell = np.sqrt(4 * np.pi / len(directions))  # over which each direction is spread
    seen = seen + 0.5 * cell * np.random.default_rng(0).normal(size=seen.shape)
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    write_bytes(path, png(overview_figure(volume, pixel_size, curves, None, None, seen, None)))
    return path
