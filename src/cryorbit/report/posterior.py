"""One picture of a map's posterior from the files ``cryorbit posterior`` wrote into the run folder. Never imports torch."""

import csv
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cryorbit.errors import RunError
from cryorbit.io.mrc import read_volume
from cryorbit.report.figures import angstrom_axis
from cryorbit.report.style import (
    BLUE,
    DENSITY,
    DIRECTIONS,
    GREEN,
    GREY,
    INK,
    ORANGE,
    bare,
    figure,
    plain,
    png,
    write_bytes,
)

Array = NDArray[np.float64]


def _columns(path: Path) -> dict[str, Array]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def _draw_curves(axes: Axes, predicted: dict[str, Array], measured: dict[str, Array]) -> None:
    plain(axes, "resolution (Å)", "correlation of half-sets")
    s = predicted["spatial_frequency_1_per_A"]
    axes.axhline(0.143, color=GREY, lw=1, ls=(0, (4, 3)))
    axes.plot(s, measured["fsc"], color=BLUE, lw=1.2, label="measured")
    axes.plot(s, predicted["fsc_half_set"], color=BLUE, lw=1.8, ls=(0, (5, 1.5)), label="predicted from the posterior")
    axes.plot(s, measured["fsc_masked"], color=ORANGE, lw=1.2, label="measured, masked")
    axes.plot(s, predicted["fsc_half_set_masked"], color=ORANGE, lw=1.8, ls=(0, (5, 1.5)), label="predicted, masked")
    axes.plot(s, predicted["fsc_truth"], color=GREEN, lw=1.2, ls=(0, (1, 1.5)), label="predicted, against the truth")
    axes.set_ylim(-0.1, 1.03)
    angstrom_axis(axes, float(s[-1]))
    axes.legend(frameon=False, fontsize=8, loc="lower left")


def _draw_slice(
    made: Figure,
    axes: Axes,
    values: NDArray[np.float32],
    title: str,
    colours: str,
    window: tuple[float, float] | None = None,
) -> None:
    low, high = window or tuple(np.percentile(values, [0.5, 99.8]))
    shown = axes.imshow(values, cmap=colours, origin="lower", vmin=low, vmax=max(high, low + 1e-12))
    bare(axes, title)
    bar = made.colorbar(shown, ax=axes, shrink=0.75, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color=GREY)


def _draw_directions(made: Figure, axes: Axes, rows: dict[str, Array]) -> None:
    """Resolution along each direction of the map, both ends of an axis alike."""
    u = np.stack([rows[k] for k in "xyz"], axis=1)
    u, value = np.concatenate([u, -u]), np.tile(rows["resolution_A"], 2)
    latitude, longitude = np.arcsin(np.clip(u[:, 2], -1, 1)), np.arctan2(u[:, 1], u[:, 0])
    best = float(value.min())
    worst = max(float(value.max()), 1.2 * best)
    shown = axes.scatter(
        longitude, latitude, c=value, s=90, cmap=DIRECTIONS + "_r", edgecolors="none", vmin=best, vmax=worst
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.set_title("resolution along each direction (Å)", fontsize=9.5, color=INK, pad=4)
    bar = made.colorbar(shown, ax=axes, shrink=0.75, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color=GREY)


def posterior_figure(run: Path) -> Figure:
    """Mean, standard deviation and missing views in slices, predicted and measured correlations, resolution by direction."""
    mean, spread, views = (read_volume(run / f"{n}.mrc")[0] for n in ("map_mean", "map_std", "missing_views"))
    middle = mean.shape[0] // 2
    made = figure(11.0, 6.2)
    grid = made.add_gridspec(2, 6)
    _draw_slice(made, made.add_subplot(grid[0, :2]), mean[middle], "mean, xy slice", DENSITY)
    score = (mean / np.maximum(spread, 1e-30))[middle]
    top = float(max(np.abs(score).max(), 3.0))
    _draw_slice(made, made.add_subplot(grid[0, 2:4]), score, "mean over standard deviation, xy", "RdBu", (-top, top))
    _draw_slice(
        made,
        made.add_subplot(grid[0, 4:]),
        views[:, middle],
        "information over its shell's mean, xz",
        DIRECTIONS,
        (0.0, 2.0),
    )
    _draw_curves(made.add_subplot(grid[1, :3]), _columns(run / "ss_snr.csv"), _columns(run / "fsc.csv"))
    _draw_directions(made, made.add_subplot(grid[1, 3:], projection="mollweide"), _columns(run / "directions.csv"))
    return made


def write_figure(run: Path) -> Path:
    """``figures/posterior.png`` of a run folder, from its files alone.

    Raises
    ------
    RunError
        The folder holds no posterior.
    """
    try:
        json.loads((run / "posterior.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError("RUN044", f"{run} holds no posterior ({error})", "run `cryorbit posterior` first") from error
    (run / "figures").mkdir(exist_ok=True)
    target = run / "figures" / "posterior.png"
    write_bytes(target, png(posterior_figure(run)))
    return target
