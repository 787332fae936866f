"""From a particle stack to 2-D classes: engine -> assignment -> averages on halves -> files. Orchestration only."""

import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cryorbit.conventions import PARTICLE_COLUMNS
from cryorbit.groups.so2 import SO2
from cryorbit.io.atomic import atomic_path
from cryorbit.io.mrc_write import StackWriter
from cryorbit.io.particles import write_particles
from cryorbit.methods.align2d import Align2D, Assignment
from cryorbit.methods.class_averages import ClassAverages
from cryorbit.metrics.fsc import crossing, resolution
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.inputs import Inputs, bright, prepare
from cryorbit.pipeline.rundir import opened
from cryorbit.pipeline.start import fourier_stack
from cryorbit.training.checkpoint import State, kept
from cryorbit.training.dataset import FourierStack
from cryorbit.training.history import History
from cryorbit.training.loop import Progress, run

_ASSIGN_BATCH = 1000
_LIKELIER_JUNK = 0.0  # nats


@dataclass(frozen=True)
class Classes:
    """2-D classes, the largest first.

    Attributes
    ----------
    pictures
        (K, D, D) averages, bright, on the images' grey scale.
    correlation
        (K, D // 2 + 1) Fourier ring correlation of each class's half averages.
    which, angles, shifts
        (N,) class, (N,) radian as in ``groups.so2``, (N, 2) angstrom.
    gain, junk
        (N,) as in ``methods.align2d.Assignment``.
    features
        (N, K) as of ``methods.align2d.invariant_features``.
    metrics
        Ready for JSON.
    """

    pictures: Float[Tensor, "k d d"]
    correlation: Float[Tensor, "k shells"]
    which: Int[Tensor, " n"]
    angles: Float[Tensor, " n"]
    shifts: Float[Tensor, "n 2"]
    gain: Float[Tensor, " n"]
    junk: Float[Tensor, " n"]
    features: Float[Tensor, "n k"]
    metrics: dict[str, object]


def align2d(config: RunConfig, output: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Classes:
    """Find 2-D classes, every particle's class, in-plane angle and shift, and write the run folder.

    Parameters
    ----------
    config
        Settings, ``start`` being ``classes``; the same config and folder continue an interrupted run.
    output
        Run folder.
    overwrite
        Delete a previous run in ``output`` first.
    progress
        Called after each step.
    """
    inputs = bright(config, prepare(config))
    with opened(output, config, inputs, overwrite=overwrite) as fingerprint:
        return _run(config, inputs, output, progress, fingerprint)


def _run(config: RunConfig, inputs: Inputs, output: Path, progress: Progress | None, fingerprint: str) -> Classes:
    history, folder, begun = History(output / "history.jsonl"), output / "checkpoint", time.monotonic()
    particles = inputs.particles
    extent = particles.box * particles.pixel_size
    radius = min(config.align2d.radius_end * extent / inputs.mask_diameter, 0.5 * particles.box - 1)
    stack = fourier_stack(config, inputs, float(round(radius)))
    engine = Align2D(stack, config.align2d, mask_diameter=inputs.mask_diameter, seed=config.seed)

    def go(method: Align2D | ClassAverages) -> None:
        checkpoint = folder / f"{method.name}.safetensors"
        run(method, checkpoint=checkpoint, history=history, progress=progress, fingerprint=fingerprint)

    go(engine)
    found = _assign(engine, folder / "assigned.safetensors", fingerprint)
    full = fourier_stack(config, inputs)
    final = ClassAverages(
        full,
        config.averages,
        classes=engine.classes,
        which=found.which,
        angles=found.angles,
        shifts_px=found.shifts * (stack.pixel_size / full.pixel_size),
        half_set=inputs.half_set,
        mask_diameter=inputs.mask_diameter,
    )
    go(final)
    shared = stack.box * stack.pixel_size / engine.radius()
    classes = _summarise(config, inputs, full, final, found, shared, time.monotonic() - begun)
    _write(output, inputs, classes)
    return classes


def _assign(engine: Align2D, path: Path, fingerprint: str) -> Assignment:
    """Class and pose of every particle; kept, so that a resumed run does not repeat it."""
    count = len(engine.stack)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(Assignment.__dataclass_fields__, (count,))
    shapes |= {"shifts": (count, 2), "features": (count, engine.classes)}

    def make() -> State:
        parts = [engine.assign(chosen) for chosen in torch.arange(count).split(_ASSIGN_BATCH)]
        return {name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in shapes}

    return Assignment(**kept(path, fingerprint, shapes, make))


def _summarise(
    config: RunConfig,
    inputs: Inputs,
    stack: FourierStack,
    final: ClassAverages,
    found: Assignment,
    shared: float,
    seconds: float,
) -> Classes:
    apix, box = stack.pixel_size, stack.box
    pictures = final.pictures / stack.scale
    sizes = torch.bincount(found.which, minlength=final.classes)
    order = sizes.argsort(descending=True, stable=True)
    rank = order.argsort()
    which, sizes = rank[found.which], sizes[order]
    correlation, pictures = final.correlation[order], pictures[order]
    likelier = found.junk > _LIKELIER_JUNK
    reached = [_resolution(curve, int(n), box, apix) for curve, n in zip(correlation, sizes, strict=True)]
    known = sorted(r for r in reached if r is not None)
    metrics: dict[str, object] = {
        "particles": len(which),
        "classes": int((sizes > 0).sum()),
        "box": box,
        "pixel_size_A": apix,
        "mask_diameter_A": inputs.mask_diameter,
        "seed": config.seed,
        "contrast": "dark" if inputs.particles.sign < 0 else "light",
        "class_sizes": sizes.tolist(),
        "class_resolution_A": reached,
        "class_junk_share": [float(likelier[which == k].float().mean()) if n else None for k, n in enumerate(sizes)],
        "resolution_best_A": known[0] if known else None,
        "resolution_median_A": known[len(known) // 2] if known else None,
        "shared_reference_A": shared,
        "junk_share": float(likelier.float().mean()),
        "effective_poses_median": float(found.effective.median()),
        "seconds": seconds,
        "warnings": list(inputs.warnings),
    }
    features = found.features[:, order]
    shifts = final.shifts * apix
    return Classes(pictures, correlation, which, final.angles, shifts, found.gain, found.junk, features, metrics)


def _resolution(curve: Float[Tensor, " shells"], members: int, box: int, apix: float) -> float | None:
    """Where a class's FRC first falls below 0.143; None for a class whose halves never agree."""
    shell = crossing(curve, 0.143)
    if members < 2 or (shell is not None and shell < 1):
        return None
    return resolution(curve, 0.143, box, apix)


def _write(output: Path, inputs: Inputs, classes: Classes) -> None:
    count, box, apix = len(classes.pictures), inputs.particles.box, inputs.particles.pixel_size
    with StackWriter(output / "classes.mrcs", count, box, apix) as stack:
        stack.write(classes.pictures.numpy())
    rows = zip(
        *(classes.metrics[name] for name in ("class_sizes", "class_resolution_A", "class_junk_share")), strict=True
    )
    with atomic_path(output / "classes.csv") as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["class", "particles", "share", "resolution_A", "junk_share"])
        for number, (size, reached, junk) in enumerate(rows, 1):
            share = size / len(classes.which)
            writer.writerow([number, size, f"{share:.5f}", *("" if x is None else f"{x:.4f}" for x in (reached, junk))])
    curves = {f"class_{k}": curve for k, curve in enumerate(classes.correlation, 1)}
    outputs.write_fsc(output / "classes_frc.csv", curves, box, apix)
    rotations = np.tile(np.eye(3), (len(classes.angles), 1, 1))
    rotations[:, :2, :2] = SO2().matrix(classes.angles.double()).numpy()
    columns = {
        "class_number": [str(k + 1) for k in classes.which.tolist()],
        "log_likelihood": [f"{x:.4f}" for x in classes.gain.tolist()],
        "junk": [f"{x:.4f}" for x in classes.junk.tolist()],
    }
    write_particles(
        output / "particles.star",
        inputs.particles,
        rotations=rotations,
        shifts=classes.shifts.double().numpy(),
        half_set=inputs.half_set.numpy(),
        extra={PARTICLE_COLUMNS[name]: values for name, values in columns.items()},
        relative_to=outputs.project_folder(output),
    )
    with atomic_path(output / "features.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, classes.features.numpy())
    outputs.write_json(output / "metrics.json", classes.metrics)
