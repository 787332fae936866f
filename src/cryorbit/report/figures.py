"""The figures of the report, each from plain arrays. Every function returns a matplotlib ``Figure``."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from cryorbit.report.style import BLUE, DENSITY, DIRECTIONS, GREEN, GREY, INK, ORANGE, SERIES, bare, figure, plain

Array = NDArray[np.float64]
_AXES = (("xy", 0), ("xz", 1), ("yz", 2))


def angstrom_axis(axes: Axes, top: float) -> None:
    """Label spatial frequency by the length it stands for."""
    ticks = np.linspace(0, top, 6)[1:]
    axes.set_xticks(ticks, [f"{1 / t:.1f}" for t in ticks])
    axes.set_xlim(0, top)


def draw_fsc(
    axes: Axes, curves: dict[str, Array], truth: tuple[Array, Array] | None = None, resolution: float | None = None
) -> None:
    """FSC curves over resolution, the 0.143 line, and the 0.5 line where a comparison with the truth is drawn too."""
    s = curves["spatial_frequency_1_per_A"]
    plain(axes, "resolution (Å)", "Fourier shell correlation")
    axes.axhline(0, color="#d7dade", lw=0.8)
    axes.axhline(0.143, color=GREY, lw=1, ls=(0, (4, 3)))
    axes.annotate("0.143", (s[-1], 0.143), ha="right", va="bottom", fontsize=8, color="#5d636b")
    axes.plot(s, curves["fsc"], color=BLUE, lw=1.8, label="half maps")
    if "fsc_masked" in curves:
        axes.plot(s, curves["fsc_masked"], color=ORANGE, lw=1.8, label="half maps, masked, corrected")
    if truth is not None:
        axes.plot(*truth, color=GREEN, lw=1.8, ls=(0, (5, 1.5)), label="against the truth, masked")
        axes.axhline(0.5, color=GREY, lw=1, ls=(0, (1, 2)))
        axes.annotate("0.5", (s[-1], 0.5), ha="right", va="bottom", fontsize=8, color="#5d636b")
    shown = curves.get("fsc_masked", curves["fsc"])
    if resolution and not (shown[1:] < 0.143).any():  # no crossing to mark: the images end before the curve falls
        axes.annotate(
            f"Nyquist, {resolution:.1f} Å",
            (s[-1], float(np.nan_to_num(shown[-1]))),
            xytext=(-4, 6),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=INK,
        )
    elif resolution and np.isfinite(resolution) and 1 / resolution <= s[-1] * 1.001:
        axes.plot([1 / resolution], [0.143], "o", color=INK, ms=5, zorder=5)
        axes.annotate(
            f"{resolution:.1f} Å",
            (1 / resolution, 0.143),
            xytext=(6, 8),
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )
    axes.set_ylim(min(-0.1, float(np.nanmin(curves["fsc"])) - 0.02), 1.03)
    angstrom_axis(axes, float(s[-1]))
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def fsc_figure(
    curves: dict[str, Array], truth: tuple[Array, Array] | None = None, resolution: float | None = None
) -> Figure:
    """FSC curves on their own."""
    made = figure(7.2, 4.0)
    draw_fsc(made.add_subplot(), curves, truth, resolution)
    return made


def _window(values: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(values, [0.5, 99.8])
    return float(low), float(high if high > low else low + 1)


def draw_map(parent: Figure | SubFigure, volume: NDArray[np.float32], pixel_size: float) -> None:
    """Three central slices over three projections, with a scale bar."""
    axes = parent.subplots(2, 3)
    box = volume.shape[0]
    slices = _window(volume[box // 4 : 3 * box // 4])
    for column, (name, axis) in enumerate(_AXES):
        shown = np.take(volume, box // 2, axis=axis)
        axes[0, column].imshow(
            shown, cmap=DENSITY, origin="lower", vmin=slices[0], vmax=slices[1], interpolation="nearest"
        )
        projection = volume.sum(axis=axis)
        low, high = _window(projection)
        axes[1, column].imshow(projection, cmap=DENSITY, origin="lower", vmin=low, vmax=high, interpolation="nearest")
        bare(axes[0, column], f"{name} slice")
        bare(axes[1, column], f"{name} projection")
    length = _round_length(0.3 * box * pixel_size)
    start, end = 0.05 * box, 0.05 * box + length / pixel_size
    axes[1, 0].plot([start, end], [0.06 * box] * 2, color="white", lw=2.5, solid_capstyle="butt")
    axes[1, 0].text((start + end) / 2, 0.09 * box, f"{length:g} Å", color="white", ha="center", va="bottom", fontsize=8)


def _round_length(length: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not longer."""
    power = 10 ** np.floor(np.log10(length))
    return float(max(m * power for m in (1, 2, 5) if m * power <= length))


def slices_figure(volume: NDArray[np.float32], pixel_size: float) -> Figure:
    """Central slices and projections of the map."""
    made = figure(7.2, 5.1)
    draw_map(made, volume, pixel_size)
    return made


def draw_orientations(axes: Axes, directions: Array) -> Any:
    """Mollweide heat map of view directions (N, 3): particles per solid angle over what an even spread would give.

    Cells of equal area, about four particles each and at most 36 x 72 of them, smoothed over their neighbours.
    """
    bins = int(np.clip(np.sqrt(len(directions) / 8), 6, 36))
    z = np.clip(directions[:, 2], -1, 1)
    longitude = np.arctan2(directions[:, 1], directions[:, 0])
    lon = np.linspace(-np.pi, np.pi, 2 * bins + 1)
    sine = np.linspace(-1, 1, bins + 1)
    counts, _, _ = np.histogram2d(longitude, z, bins=(lon, sine))
    relative = counts / (len(directions) / counts.size)  # equal areas: every cell expects as many
    fine = 12  # straight-edged cells must be small to fill the ellipse
    edges = np.linspace(-np.pi, np.pi, 2 * bins * fine + 1), np.arcsin(np.linspace(-1, 1, bins * fine + 1))
    cells = np.repeat(np.repeat(_smooth(relative).T, fine, axis=0), fine, axis=1)
    drawn = axes.pcolormesh(*edges, cells, cmap=DIRECTIONS, shading="flat", vmin=0, rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    return drawn


def _smooth(cells: Array) -> Array:
    """Weights 1-2-1 along both axes, round the sphere in longitude."""
    around = 0.5 * cells + 0.25 * (np.roll(cells, 1, axis=0) + np.roll(cells, -1, axis=0))
    padded = np.pad(around, ((0, 0), (1, 1)), mode="edge")
    return np.asarray(0.5 * around + 0.25 * (padded[:, :-2] + padded[:, 2:]), dtype=np.float64)


def orientations_figure(directions: Array) -> Figure:
    """Orientation distribution."""
    made = figure(7.2, 3.7)
    drawn = draw_orientations(made.add_subplot(projection="mollweide"), directions)
    bar = made.colorbar(drawn, shrink=0.7, pad=0.02)
    bar.set_label("particles, relative to an even spread", fontsize=9, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, color=GREY)
    return made


def examples_figure(images: NDArray[Any], predictions: NDArray[Any], indices: NDArray[Any]) -> Figure:
    """Each example image over the model's prediction (in its own grey range) and what is left."""
    count = len(images)
    made = figure(1.0 * count + 0.7, 3.3)
    axes = np.atleast_2d(made.subplots(3, count, squeeze=False))
    for i, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        low, high = _window(image)
        quiet_low, quiet_high = _window(prediction)
        axes[0, i].imshow(image, cmap=DENSITY, origin="lower", vmin=low, vmax=high)
        axes[1, i].imshow(prediction, cmap=DENSITY, origin="lower", vmin=quiet_low, vmax=quiet_high)
        axes[2, i].imshow(image - prediction, cmap=DENSITY, origin="lower", vmin=low, vmax=high)
        bare(axes[0, i], f"{int(indices[i]) + 1}", 8.0)
        bare(axes[1, i])
        bare(axes[2, i])
    for row, label in enumerate(("image", "prediction", "residual")):
        axes[row, 0].set_ylabel(label, fontsize=9, color=INK)
    return made


def history_figure(history: list[dict[str, Any]], most: int = 6) -> Figure | None:
    """Numeric quantities of ``history.jsonl`` over the steps, a panel each, stages in colours; None when there are
    none.
    """
    stages = list(dict.fromkeys(str(r.get("stage", "run")) for r in history))
    skip = {"step", "stage", "time", "seconds", "elapsed"}
    numeric = [
        k
        for r in history
        for k, v in r.items()
        if k not in skip and isinstance(v, int | float) and not isinstance(v, bool)
    ]
    keys = [k for k in dict.fromkeys(numeric) if numeric.count(k) > 1][:most]
    if not keys:
        return None
    rows = -(-len(keys) // 3)
    made = figure(7.8, 2.1 * rows + 0.2)
    panels = made.subplots(rows, min(3, len(keys)), squeeze=False).ravel()
    for panel, key in zip(panels, keys, strict=False):
        offset = 0
        for stage, colour in zip(stages, SERIES, strict=False):
            own = [r for r in history if str(r.get("stage", "run")) == stage]
            points = [(offset + i, float(r[key])) for i, r in enumerate(own) if isinstance(r.get(key), int | float)]
            if points:
                panel.plot(
                    *zip(*points, strict=True), color=colour, lw=1.4, marker="." if len(points) < 20 else "", ms=4
                )
            offset += len(own)
        plain(panel, "", "")
        panel.set_xlim(0, max(len(history) - 1, 1))
        panel.set_title(key.replace("_", " "), fontsize=9.5, color=INK, loc="left")
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
        panel.yaxis.get_offset_text().set_fontsize(8)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    handles = [panels[0].plot([], [], color=c, lw=2)[0] for _, c in zip(stages, SERIES, strict=False)]
    made.legend(
        handles, stages[: len(handles)], loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9
    )
    return made


def noise_figure(spectra: dict[str, Array], box: int, pixel_size: float) -> Figure:
    """Power per shell over resolution, a curve for each of ``spectra``, logarithmic where the first spans more than a decade."""
    made = figure(7.2, 2.8)
    axes = plain(made.add_subplot(), "resolution (Å)", "power per Fourier pixel")
    variance = next(iter(spectra.values()))
    s = np.arange(max(len(x) for x in spectra.values())) / (box * pixel_size)
    for (name, values), colour in zip(spectra.items(), SERIES, strict=False):
        axes.plot(s[1 : len(values)], values[1:], color=colour, lw=1.6, label=name)
    if variance[1:].min() > 0 and variance[1:].max() > 10 * variance[1:].min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if len(spectra) > 1:
        axes.legend(frameon=False, fontsize=8.5)
    angstrom_axis(axes, float(s[-1]))
    return made


def overview_figure(
    volume: NDArray[np.float32] | None,
    pixel_size: float | None,
    curves: dict[str, Array] | None,
    truth: tuple[Array, Array] | None,
    resolution: float | None,
    directions: Array | None,
    examples: dict[str, NDArray[Any]] | None,
) -> Figure:
    """One picture of a run: the map, the FSC, example images beside predictions, and where the views lie."""
    made = figure(12.0, 5.5)
    left, right = np.asarray(made.subfigures(1, 2, width_ratios=(1.1, 1.0))).tolist()
    if volume is not None and pixel_size is not None:
        draw_map(left, volume, pixel_size)
    grid = right.add_gridspec(2, 4, height_ratios=(1.4, 1.0))
    if curves is not None:
        draw_fsc(right.add_subplot(grid[0, :]), curves, truth, resolution)
    if examples is not None:
        inner = grid[1, :2].subgridspec(2, 3, hspace=0.0, wspace=0.0)
        for i in range(min(3, len(examples["images"]))):
            for row, kind in enumerate(("images", "predictions")):
                axes = bare(right.add_subplot(inner[row, i]))
                axes.imshow(examples[kind][i], cmap=DENSITY, origin="lower")
                if i == 0:
                    axes.set_ylabel(kind[:-1], fontsize=9, color=INK)
    if directions is not None:
        axes = right.add_subplot(grid[1, 2:], projection="mollweide")
        draw_orientations(axes, directions)
        axes.set_title("view directions", fontsize=9.5, color=INK, pad=4)
    return made
