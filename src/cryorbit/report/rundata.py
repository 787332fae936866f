"""A run folder as the report sees it: every piece that is there, and a reason for every piece that is not. Never
imports torch.
"""

import csv
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cryorbit.errors import CryorbitError, RunError
from cryorbit.io.mrc import read_volume
from cryorbit.io.particles import open_particles

Array = NDArray[np.float64]
T = TypeVar("T")

PIECES = (
    "metrics.json",
    "fsc.csv",
    "map.mrc",
    "particles.star",
    "report_data.npz",
    "history.jsonl",
    "evaluation.json",
    "provenance.json",
    "config.toml",
)


@dataclass(frozen=True)
class RunData:
    """What a run folder holds. A piece that is missing or unreadable is None (or empty) and has its reason in
    ``missing[file name]``.

    ``fsc`` maps column names of ``fsc.csv`` to arrays; ``volume`` is (D, D, D); ``directions`` (N, 3) unit view vectors
    in the molecule's frame; ``examples`` holds ``images``, ``predictions`` (m, D, D) and ``indices`` (m,); ``history``
    is a list of records.
    """

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    fsc: dict[str, Array] | None = None
    volume: NDArray[np.float32] | None = None
    pixel_size: float | None = None
    directions: Array | None = None
    examples: dict[str, NDArray[Any]] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    missing: dict[str, str] = field(default_factory=dict)


def _json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise RunError("RUN021", f"{path.name} holds a {type(values).__name__}, expected an object")
    return values


def _typed(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """An object whose values under these keys, where they are there, have these types."""
    values = _json(path)
    for key, kind in kinds.items():
        if values.get(key) is not None and not isinstance(values[key], kind):
            raise RunError("RUN021", f"{key} in {path.name} is {values[key]!r:.40}, expected a {kind.__name__}")
    return values


def _metrics(path: Path) -> dict[str, Any]:
    return _typed(path, {"warnings": list, "stage_seconds": dict, "status": str})


def _evaluation(path: Path) -> dict[str, Any] | None:
    values = _typed(path, {"poses": dict})
    for key in ("fraction_below_5_deg", "fraction_below_10_deg"):
        fraction = (values.get("poses") or {}).get(key, 0.0)
        if not isinstance(fraction, int | float):
            raise RunError("RUN021", f"{key} in {path.name} is {fraction!r:.40}, expected a number")
    return values


def _fsc(path: Path) -> dict[str, Array] | None:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or "fsc" not in rows[0] or "spatial_frequency_1_per_A" not in rows[0]:
        raise RunError("RUN022", f"{path.name} lacks the columns spatial_frequency_1_per_A and fsc")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0] if name != "resolution_A"}


def _history(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [r for r in records if isinstance(r, dict) and "step" in r]


def _examples(path: Path) -> dict[str, NDArray[Any]] | None:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in ("images", "predictions", "indices")}
    if arrays["images"].shape != arrays["predictions"].shape or arrays["images"].ndim != 3:
        raise RunError(
            "RUN023",
            f"{path.name}: images {arrays['images'].shape} and predictions {arrays['predictions'].shape} do not match",
        )
    return arrays


def _map(path: Path) -> tuple[NDArray[np.float32], float] | None:
    return read_volume(path)


def _directions(path: Path) -> Array | None:
    rotations = open_particles(path, require_images=False).rotations
    if rotations is None:
        raise RunError("RUN024", f"{path.name} carries no angles")
    return np.asarray(rotations, dtype=np.float64)[:, 2, :]


def _config(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    tomllib.loads(text)
    return text


def load_run(folder: Path) -> RunData:
    """Read what a run folder holds; damaged or missing pieces are noted, not raised.

    Raises
    ------
    RunError
        The folder does not exist, or holds none of a run's files.
    """
    if not folder.is_dir():
        raise RunError("RUN020", f"{folder} is not a folder", "give the --output folder of a reconstruction")
    if (folder / "classes.mrcs").exists() and not (folder / "map.mrc").exists():
        raise RunError(
            "RUN020", f"{folder} holds 2-D classes, not a map", "its page is classes.png; report is for reconstructions"
        )
    if not any((folder / name).exists() for name in PIECES):
        raise RunError(
            "RUN020",
            f"{folder} holds none of a run's files ({', '.join(PIECES[:4])}, ...)",
            "give the --output folder of a reconstruction",
        )
    missing: dict[str, str] = {}

    def piece(name: str, reader: Callable[[Path], T], otherwise: T) -> T:
        path = folder / name
        if not path.exists():
            missing[name] = f"{name} is not in the run folder"
            return otherwise
        try:
            return reader(path)
        except CryorbitError as error:
            missing[name] = error.message
        except Exception as error:  # a damaged file can raise anything: BadZipFile, zlib.error, EOFError, TypeError
            missing[name] = f"{name} cannot be read: {str(error) or type(error).__name__}"
        return otherwise

    stored = piece("map.mrc", _map, None)
    return RunData(
        folder=folder,
        metrics=piece("metrics.json", _metrics, {}),
        fsc=piece("fsc.csv", _fsc, None),
        volume=None if stored is None else stored[0],
        pixel_size=None if stored is None else stored[1],
        directions=piece("particles.star", _directions, None),
        examples=piece("report_data.npz", _examples, None),
        history=piece("history.jsonl", _history, []),
        evaluation=piece("evaluation.json", _evaluation, None),
        provenance=piece("provenance.json", _json, {}),
        config_text=piece("config.toml", _config, ""),
        missing=missing,
    )
