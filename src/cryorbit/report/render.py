"""``report.html``: one self-contained page about a run, and the same figures as PNG files beside it. Never imports
torch.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cryorbit.report import figures
from cryorbit.report.rundata import RunData, load_run
from cryorbit.report.style import png, write_bytes

PAPERS = (
    ("Scheres 2012, J. Mol. Biol. 415, 406", "Bayesian marginal likelihood and gold-standard refinement"),
    (
        "Punjani, Rubinstein, Fleet, Brubaker 2017, Nat. Methods 14, 290",
        "ab initio reconstruction by stochastic optimisation",
    ),
    ("Rosenthal and Henderson 2003, J. Mol. Biol. 333, 721", "the 0.143 criterion"),
    ("Chen et al. 2013, Ultramicroscopy 135, 24", "phase-randomised correction of masked FSC"),
    ("Górski et al. 2005, Astrophys. J. 622, 759", "HEALPix, the grid of view directions"),
)


def _number(value: Any, digits: int = 2) -> str:
    """A number a person reads: fixed digits, thin thousands; text as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not given"}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"
    return str(value)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "not given"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _truth_curve(run: RunData) -> tuple[np.ndarray, np.ndarray] | None:
    if run.evaluation is None or run.fsc is None:
        return None
    curve = run.evaluation.get("fsc_masked")
    s = run.fsc["spatial_frequency_1_per_A"]
    return (s, np.array(curve, dtype=np.float64)) if isinstance(curve, list) and len(curve) == len(s) else None


def _draw(run: RunData) -> tuple[dict[str, bytes], dict[str, str]]:
    """PNG of every figure the run has data for, by name, and why a figure could not be drawn from the data it has."""
    made: dict[str, bytes] = {}
    failed: dict[str, str] = {}
    metrics, truth = run.metrics, None

    def draw(name: str, source: str, drawing: Callable[[], Figure | None]) -> None:
        try:
            figure = drawing()
            if figure is not None:
                made[name] = png(figure)
        except Exception as error:  # readable files can still hold numbers no figure can be made of
            failed[name] = f"{source} holds values that cannot be drawn: {error}"

    try:
        truth = _truth_curve(run)
    except (TypeError, ValueError) as error:
        failed["evaluation"] = f"evaluation.json holds values that cannot be drawn: {error}"
    best = metrics.get("resolution_masked_A")
    resolution = float(best) if isinstance(best, int | float) else None
    fsc, volume, size, views, examples = run.fsc, run.volume, run.pixel_size, run.directions, run.examples
    if fsc is not None:
        draw("fsc", "fsc.csv", lambda: figures.fsc_figure(fsc, truth, resolution))
    if volume is not None and size is not None:
        draw("slices", "map.mrc", lambda: figures.slices_figure(volume, size))
    if views is not None and len(views):
        draw("orientations", "particles.star", lambda: figures.orientations_figure(views))
    if examples is not None and len(examples["images"]):
        draw("examples", "report_data.npz", lambda: figures.examples_figure(**examples))
    if run.history:
        draw("history", "history.jsonl", lambda: figures.history_figure(run.history))
    noise, box, pixel_size = (metrics.get(k) for k in ("noise_variance", "box", "pixel_size_A"))
    if isinstance(noise, list) and len(noise) > 2 and box and pixel_size:
        draw(
            "noise",
            "metrics.json",
            lambda: figures.noise_figure(_spectra(metrics), int(box), float(pixel_size)),
        )
    if volume is not None or fsc is not None:
        draw(
            "overview",
            "the run",
            lambda: figures.overview_figure(volume, size, fsc, truth, resolution, views, examples),
        )
    return made, failed


_SPECTRA = {
    "noise_variance": "images less the map's projections",
    "background_power": "around the particles",
    "image_power": "images",
}


def _spectra(metrics: dict[str, Any]) -> dict[str, NDArray[np.float64]]:
    """The power spectra in ``metrics.json``, by what the figure calls them."""
    found = {label: metrics[name] for name, label in _SPECTRA.items() if metrics.get(name)}
    return {label: np.array(values, dtype=np.float64) for label, values in found.items()}


def _pieces_missing(run: RunData, failed: dict[str, str]) -> dict[str, str]:
    """Figure or section name to the sentence shown in its place; ``failed`` as from :func:`_draw`."""
    at = run.missing
    return {
        "fsc": at.get("fsc.csv", ""),
        "slices": at.get("map.mrc", ""),
        "orientations": at.get("particles.star", "there are no particles"),
        "examples": at.get("report_data.npz", "there are no example images"),
        "history": at.get("history.jsonl", "the history holds no numbers"),
        "noise": at.get("metrics.json", "metrics.json has no noise_variance"),
        "metrics": at.get("metrics.json", ""),
        "evaluation": "no comparison with a known structure was made (cryorbit evaluate writes evaluation.json)"
        if "not in" in at.get("evaluation.json", "")
        else at.get("evaluation.json", ""),
        "provenance": at.get("provenance.json", ""),
        "config": at.get("config.toml", ""),
    } | failed


def write_report(run: Path) -> Path:
    """Render ``report.html`` and ``figures/*.png`` of a run folder from its files alone.

    Missing or damaged pieces are named in their sections; the rest is shown.

    Parameters
    ----------
    run
        Run folder of ``cryorbit reconstruct``.

    Returns
    -------
    Path of ``report.html``.

    Raises
    ------
    RunError
        The folder is not a run, or cannot be written.
    """
    data = load_run(run)
    images, failed = _draw(data)
    (run / "figures").mkdir(exist_ok=True)
    for name, image in images.items():
        write_bytes(run / "figures" / f"{name}.png", image)
    environment = Environment(
        loader=PackageLoader("cryorbit", "report"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, duration=_duration)
    page = environment.get_template("report.html.jinja").render(
        run=data,
        name=run.resolve().name,
        metrics=data.metrics,
        evaluation=data.evaluation,
        images={name: base64.b64encode(image).decode() for name, image in images.items()},
        missing=_pieces_missing(data, failed),
        papers=PAPERS,
    )
    target = run / "report.html"
    write_bytes(target, page.encode("utf-8"))
    return target
