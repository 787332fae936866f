"""One look for all figures: colours that colour-blind readers can tell apart (Okabe and Ito), thin axes, Agg only."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8a8f98", "#22262b"
SERIES = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
DENSITY, DIRECTIONS = "gray", "cividis"


def figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` x ``height`` inches with an Agg canvas, outside pyplot's global state."""
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def plain(axes: Axes, x: str = "", y: str = "") -> Axes:
    """Left and bottom axes only, small grey ticks, labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, color=GREY)
    axes.set_xlabel(x, color=INK, fontsize=10)
    axes.set_ylabel(y, color=INK, fontsize=10)
    return axes


def bare(axes: Axes, title: str = "", size: float = 9.5) -> Axes:
    """No axes at all: a picture with a caption."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=size, color=INK, pad=4)
    return axes


def png(made: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes, the same for the same data (no date inside)."""
    stream = io.BytesIO()
    made.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` under its final name only when complete."""
    from cryorbit.io.atomic import atomic_path

    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(data)
