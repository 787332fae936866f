"""A finished run, opened by the commands that go on from it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from cryorbit.errors import RunError
from cryorbit.io.particles import open_particles
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig, from_toml
from cryorbit.pipeline.inputs import Inputs, prepare
from cryorbit.poses.posterior import PosePosterior

NEEDED = ("config.toml", "metrics.json", "particles.star", "poses.npz", "map.mrc", "fsc.csv", "checkpoint")


@contextmanager
def reading(run: Path) -> Iterator[None]:
    """Wherever settings and metrics of ``run`` are taken: one that is missing, or of another kind or length, is one error (RUN041)."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RunError(
            "RUN041", f"config.toml or metrics.json in {run} is not of a finished run ({error!r})", "run it again"
        ) from error


def open_finished(run: Path) -> tuple[RunConfig, dict[str, object]]:
    """Settings of the run in the folder ``run``, with what it decided itself, and its metrics.

    Raises
    ------
    RunError
        RUN040 no finished run; RUN041 files that are not of one.
    """
    if not run.is_dir():
        raise RunError("RUN040", f"{run} is not a folder", "give the --output folder of a reconstruction")
    if (run / "classes.mrcs").exists() and not (run / "map.mrc").exists():
        raise RunError("RUN040", f"{run} holds 2-D classes, not a map", "give the --output folder of a reconstruction")
    missing = [name for name in NEEDED if not (run / name).exists()]
    if missing:
        started = (run / "config.toml").exists()
        raise RunError(
            "RUN040",
            f"{run} is not a finished run: {', '.join(missing)} missing",
            "run the command that made it again, it continues"
            if started
            else "give the --output folder of a reconstruction",
        )
    with reading(run):
        config = from_toml((run / "config.toml").read_text(encoding="utf-8"))
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        symmetry, diameter, contrast = (metrics[k] for k in ("symmetry", "mask_diameter_A", "contrast"))
        shape = {"box": int(metrics["box"]), "particles": int(metrics["particles"])}
        size = {"pixel_size_A": float(metrics["pixel_size_A"])}
        config = replace(config, symmetry=str(symmetry), mask_diameter=float(diameter), contrast=str(contrast))
    return config, metrics | shape | size


def inputs_of(run: Path, config: RunConfig, metrics: dict[str, object]) -> Inputs:
    """The particles of the run, if they are still those it was made from, with the defocus it gave them."""
    inputs = prepare(config)
    now = {"box": inputs.particles.box, "particles": len(inputs.particles), "pixel_size_A": inputs.particles.pixel_size}
    for name, value in now.items():
        if not abs(float(str(metrics[name])) - value) <= 1e-4 * value:
            raise RunError(
                "RUN043",
                f"{config.particles} has {name} {value:g}, {run} was made from {metrics[name]}",
                "put the particles the run was made from back, or run it again",
            )
    ours = open_particles(run / "particles.star", require_images=False)
    if inputs.particles.ctf is None or ours.ctf is None or len(ours) != len(inputs.particles):
        return inputs
    refined = {name: ours.ctf[name] for name in ("defocus_u", "defocus_v")}
    return replace(inputs, particles=replace(inputs.particles, ctf=inputs.particles.ctf | refined))


def posterior_of_run(run: Path, count: int) -> PosePosterior:
    """Posteriors of the poses of the run's ``count`` particles, shifts in angstrom."""
    ours = open_particles(run / "particles.star", require_images=False)
    stored = outputs.posterior_of(run / "poses.npz", np.asarray(ours.rotations))
    if len(stored.mass) != count:
        raise RunError("RUN043", f"{run / 'poses.npz'} has poses of {len(stored.mass)} particles, there are {count}")
    return stored
