"""``cryorbit evaluate``: a finished run beside the truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from cryorbit.errors import DataError, RunError
from cryorbit.io import relion
from cryorbit.io.atomic import write_text
from cryorbit.io.mrc import read_volume, write_volume
from cryorbit.io.particles import ParticleSet, open_particles
from cryorbit.io.stacks import split_image_name


def match_images(ours: list[str], theirs: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the same images in two lists of image names, ``number@stack``.

    Names are compared by number and the longest end of the path that tells the stacks of either list apart: first by
    the file name alone, then by whole paths where two folders hold stacks of the same name.

    Parameters
    ----------
    ours, theirs
        Image names as the STAR files have them.

    Returns
    -------
    Two index arrays of equal length, in the order of ``ours``.

    Raises
    ------
    DataError
        No image is in both, or a name occurs twice.
    """

    def keys(names: list[str], whole: bool) -> list[tuple[int, str]]:
        pairs = [split_image_name(name) for name in names]
        return [(number, stack if whole else Path(stack).name) for number, stack in pairs]

    for whole in (False, True):
        left, right = keys(ours, whole), keys(theirs, whole)
        if len(set(left)) == len(left) and len(set(right)) == len(right):
            break
    else:
        raise DataError(
            "DATA221",
            "an image name occurs twice in one of the particle files, expected each once",
            "remove the duplicates",
        )
    place = {key: row for row, key in enumerate(right)}
    rows = [(row, place[key]) for row, key in enumerate(left) if key in place]
    if not rows:
        raise DataError(
            "DATA222",
            f"no image of the run ({ours[0]}, ...) is in the true poses ({theirs[0]}, ...)",
            "give the truth of the same stacks: images are matched by number@stack, not by row",
        )
    index = np.array(rows, dtype=np.int64)
    return index[:, 0], index[:, 1]


def _poses(particles: ParticleSet, rows: NDArray[np.int64], what: str) -> Any:
    import torch

    from cryorbit.types import Poses

    if particles.rotations is None:
        raise DataError("DATA223", f"{what} has no angles, expected rot, tilt and psi of every particle")
    shifts = np.zeros((len(particles), 2)) if particles.shifts is None else particles.shifts
    return Poses(torch.from_numpy(particles.rotations[rows]), torch.from_numpy(shifts[rows]))


def _volume(path: Path) -> Any:
    import torch

    from cryorbit.types import Volume

    data, pixel_size = read_volume(path)
    if np.ptp(data) == 0:
        raise RunError("RUN034", f"the map {path} is constant: there is nothing to compare")
    return Volume(torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)), pixel_size)


def _symmetry(run: Path) -> str:
    path = run / "metrics.json"
    if not path.exists():
        return "C1"
    try:
        symmetry = json.loads(path.read_text(encoding="utf-8")).get("symmetry", "C1")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = "it holds no object" if isinstance(error, AttributeError) else f"{error}"
        raise RunError(
            "RUN032",
            f"{path} cannot be read: {reason}; expected the metrics of a reconstruction",
            "say the run's symmetry with --symmetry, for example --symmetry C1",
        ) from error
    if not isinstance(symmetry, str):
        raise RunError("RUN032", f"{path} holds the symmetry {symmetry}, expected text", "say it with --symmetry")
    return symmetry


def _true_particles(path: Path) -> ParticleSet:
    if path.suffix.lower() not in (".star", ".cs"):
        raise RunError(
            "RUN033",
            f"{path} holds no poses; expected a .star or .cs file with the true angles",
            "a true map is given with --truth",
        )
    try:
        return open_particles(path, require_images=False)
    except DataError as error:
        if error.code != "DATA027":  # its hint is an option of other commands
            raise
        raise DataError(
            error.code, f"{path.name} does not say the pixel size", "add the pixel size to its optics table"
        ) from error


def _credible(
    path: Path, written: NDArray[np.float64], rows: NDArray[np.int64], true: Any, found: Any, group: Any
) -> dict[str, float]:
    """How often the truth lies inside the 50, 68, 90, 95 and 99 % regions of the run's posterior."""
    import torch

    from cryorbit.pipeline.outputs import posterior_of
    from cryorbit.poses.posterior import covered, levels_of_truth

    stored, index = posterior_of(path, written), torch.from_numpy(rows)
    return covered(levels_of_truth(stored.rows(index), true, found, group))


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("", "masked", "unmasked", title="against the truth", title_justify="left", box=None, pad_edge=False)
    if "fsc" in result:
        for threshold in ("0.5", "0.143"):
            masked, unmasked = result[f"resolution_{threshold}_masked_A"], result[f"resolution_{threshold}_A"]
            table.add_row(f"resolution, FSC {threshold} (A)", f"{masked:.2f}", f"{unmasked:.2f}")
        table.add_row("correlation", f"{result['correlation_masked']:.3f}", f"{result['correlation']:.3f}")
        table.add_row("hand", result["hand"] + (" (undecided)" if result["hand_undecided"] else ""))
    poses = result.get("poses")
    if poses:
        table.add_row(
            f"pose error of {poses['particles']} particles (deg)",
            f"median {poses['median_deg']:.2f}",
            f"mean {poses['mean_deg']:.2f}",
        )
        table.add_row("  chance would give", f"median {poses['chance_median_deg']:.1f}")
        within = [f"{100 * poses[f'fraction_below_{limit}_deg']:.1f} % < {limit} deg" for limit in (5, 10)]
        table.add_row("  particles within", *within)
        table.add_row(
            "  view / in-plane (deg)",
            f"median {poses['out_of_plane_median_deg']:.2f}",
            f"median {poses['in_plane_median_deg']:.2f}",
        )
        if "credible" in poses:
            inside = poses["credible"]
            table.add_row(
                "truth in credible regions",
                f"{100 * inside['0.9']:.1f} % of 90 %",
                f"{100 * inside['0.5']:.1f} % of 50 %",
            )
        table.add_row(
            "shift error (median)", f"{poses['shift_median_px']:.3f} px", f"{poses['shift_median_angst']:.3f} A"
        )
    return table


def evaluate(
    run: Path = typer.Argument(..., help="Run folder of cryorbit reconstruct."),
    truth: Path | None = typer.Option(
        None, "--truth", help="True map (.mrc), same box and pixel size as the run's map."
    ),
    truth_poses: Path | None = typer.Option(
        None, "--truth-poses", help="STAR file with the true poses of the same images."
    ),
    symmetry: str = typer.Option("", "--symmetry", help="Point group for pose errors (default: the run's)."),
    aligned: bool = typer.Option(
        False, "--write-aligned", help="Also write the map in the true frame as map_aligned.mrc."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print evaluation.json instead of a table."),
) -> None:
    """Compare a run's map and poses with the truth, over rotation, shift and both hands; writes evaluation.json."""
    if truth is None and truth_poses is None:
        raise RunError("RUN031", "nothing to compare with", "give --truth truth.mrc, --truth-poses truth.star, or both")
    if not run.is_dir():
        raise RunError("RUN030", f"{run} is not a run folder", "give the --output folder of a reconstruction")
    from rich.console import Console

    from cryorbit.groups.point import point_group
    from cryorbit.metrics.evaluation import compare_maps, compare_poses

    result: dict[str, Any] = {"truth": str(truth or ""), "truth_poses": str(truth_poses or "")}
    poses = None
    if truth_poses is not None:
        theirs = _true_particles(truth_poses)
        ours = open_particles(run / "particles.star", require_images=False)
        group = point_group(symmetry or _symmetry(run))
        rows = match_images(ours.table.columns[relion.IMAGE], theirs.table.columns[relion.IMAGE])
        estimated, true = (_poses(p, r, str(p.path)) for p, r in zip((ours, theirs), rows, strict=True))
        poses, values = compare_poses(estimated, true, ours.pixel_size, group)
        result["poses"] = {**values, "particles_in_run": len(ours), "particles_in_truth": len(theirs)}
        if (run / "poses.npz").exists():
            result["poses"]["credible"] = _credible(
                run / "poses.npz", np.asarray(ours.rotations), rows[0], true, poses, group
            )
    if truth is not None:
        comparison = compare_maps(_volume(run / "map.mrc"), _volume(truth), poses)
        result |= comparison.values()
        if aligned:
            write_volume(run / "map_aligned.mrc", comparison.aligned.data.numpy(), comparison.aligned.pixel_size)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_text(run / "evaluation.json", text)
    if as_json:
        typer.echo(text, nl=False)
    else:
        Console(highlight=False, soft_wrap=True).print(_table(result))
