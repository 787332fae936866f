"""New particles of a structure that a finished run knows: an encoder, taught the run once, poses them. Orchestration only."""

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cryorbit.conventions import PARTICLE_COLUMNS
from cryorbit.errors import ConfigError, DataError, RunError
from cryorbit.groups.point import point_group
from cryorbit.io.particles import ParticleSet, open_particles, write_particles
from cryorbit.methods.distillation import DistillationConfig
from cryorbit.pipeline import outputs
from cryorbit.pipeline.config import RunConfig
from cryorbit.pipeline.finished import open_finished
from cryorbit.pipeline.inputs import check_ctf, choose_device, open_checked
from cryorbit.pipeline.knowledge import Knowledge, assigner_of, taught
from cryorbit.pipeline.verdict import TRUST
from cryorbit.poses.assignment import Assigned, Assigner
from cryorbit.training.dataset import FourierStack
from cryorbit.training.loop import Progress

_SAME_SIZE = 0.01


def assign(
    particles: Path,
    run: Path,
    output: Path,
    *,
    teaching: DistillationConfig | None = None,
    searched_below: float | None = None,
    steps: int = 2,
    batch: int = 500,
    datadir: Path | None = None,
    device: str = "",
    progress: Progress | None = None,
) -> dict[str, object]:
    """Pose new particles of the structure of a finished run; writes ``particles.star`` and ``assign.json`` into ``output``.

    Parameters
    ----------
    particles
        STAR, .cs or stack, prepared as the run's were.
    run
        Run folder of ``cryorbit reconstruct`` or ``refine``; its encoder is taught first where it has none.
    output
        New or empty folder.
    teaching
        Settings of the encoder; another encoder than the run's is taught where they differ.
    searched_below
        Confidence below which a particle is searched for; None takes what held-out particles of the run taught.
    steps
        Gauss-Newton steps.
    batch
        Images read and posed at a time.
    datadir
        Where the stacks of ``particles`` are.
    device
        In place of the run's own.
    progress
        Called after each step of teaching, and each batch of particles.

    Returns
    -------
    What was written to ``assign.json``.

    Raises
    ------
    RunError
        The run is not finished, or ``output`` holds other files.
    DataError, ConfigError
        Particles that are not like the run's, or a setting out of range.
    """
    if searched_below is not None and not 0 <= searched_below <= 1:
        raise ConfigError(
            "CONF511", f"threshold {searched_below} is not a confidence", "give 0 (search none) to 1 (all)"
        )
    if steps < 0 or batch < 1:
        raise ConfigError(
            "CONF511", f"{steps} Gauss-Newton steps of {batch} images at a time", "give 0 or more, and 1 or more"
        )
    config, metrics = open_finished(run)
    if device:
        choose_device(device)
        config = replace(config, device=device)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError("RUN046", f"{output} is not an empty folder", "choose a new --output folder")
    new, warnings = _opened(particles, datadir, config, metrics, run)
    if metrics.get("verdict", TRUST) != TRUST:
        warnings.append(f"the run in {run} says of itself: {metrics['verdict']}. Poses can be no better than its map")
    begun = time.monotonic()
    weights, known = taught(run, config, metrics, teaching, progress)
    teaching_seconds = time.monotonic() - begun
    at = choose_device(config.device)
    assigner = assigner_of(run, config, known, weights, steps, at)
    line = known.threshold if searched_below is None else searched_below
    begun = time.monotonic()
    found, confidence, searched = _all(assigner, known, new, config, line, batch, at, progress)
    seconds = time.monotonic() - begun
    output.mkdir(parents=True, exist_ok=True)
    _write(output, new, found, confidence, searched)
    values: dict[str, object] = {
        "particles": len(new),
        "run": str(run),
        "searched": int(searched.sum()),
        "searched_below": line,
        "confidence_median": float(confidence.median()),
        "confidence_mean": float(confidence.mean()),
        "strength_median": float(found.strength.median()),
        "pose_spread_deg": float(torch.rad2deg(found.spread[:, 0]).median()),
        "gauss_newton_steps": steps,
        "images_per_second": len(new) / max(seconds, 1e-9),
        "seconds": seconds,
        "seconds_teaching": teaching_seconds,
        "held_out": known.held_out,
        "encoder": asdict(known.teaching),
        "warnings": warnings,
    }
    outputs.write_json(output / "assign.json", values)
    outputs.write_json(output / "provenance.json", outputs.provenance(particles, str(at)))
    return values


def _opened(
    particles: Path, datadir: Path | None, config: RunConfig, metrics: dict[str, object], run: Path
) -> tuple[ParticleSet, list[str]]:
    """New particles, if they are like those of the run."""
    new, warnings = open_checked(replace(config, particles=str(particles), datadir=str(datadir or "")))
    box, size = int(str(metrics["box"])), float(str(metrics["pixel_size_A"]))
    if new.box != box or abs(new.pixel_size - size) > _SAME_SIZE * size:
        raise DataError(
            "DATA046",
            f"{particles.name} has images of {new.box} px of {new.pixel_size:.3f} A, the run in {run} of {box} px of {size:.3f} A",
            "extract the new particles with the box and pixel size of the run's",
        )
    if (
        new.ctf is None
        and not config.no_ctf
        and open_particles(run / "particles.star", require_images=False).ctf is not None
    ):
        raise DataError(
            "DATA047",
            f"{particles.name} has no CTF, the particles of the run in {run} have one",
            "estimate defocus before particles are posed",
        )
    check_ctf(new, config.abinitio.radii(len(point_group(config.symmetry))), config.mask_diameter)
    return new, warnings


def _all(
    assigner: Assigner,
    known: Knowledge,
    new: ParticleSet,
    config: RunConfig,
    line: float,
    batch: int,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Assigned, Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Every new particle once, a batch in memory at a time; those of low confidence once more, by search."""
    stack = FourierStack(new, 0.5 * new.box, mask_diameter=config.mask_diameter, memory_gib=0.0, device=device)
    parts, confidences, looked = [], [], []
    for chosen in torch.arange(len(stack)).split(batch):
        images, ctf = stack.images(chosen) * (known.scale / stack.scale), stack.ctf(chosen)
        found = assigner.encoded(images, ctf)
        confidence = known.by_encoder(found.features)
        low = (confidence < line) | (line >= 1)
        if bool(low.any()):
            rows = low.to(images.device)
            again = assigner.searched(images[rows], ctf[rows])
            found = found.replaced(rows, again)
            confidence[low] = known.by_search(again.features)
        parts.append(found)
        confidences.append(confidence)
        looked.append(low)
        if progress is not None:
            values: dict[str, float | str] = {
                "resolution_A": 2 * new.pixel_size,
                "confidence": float(confidence.median()),
            }
            progress("assign", len(parts), -(-len(stack) // batch), values)
    return Assigned.joined(parts), torch.cat(confidences), torch.cat(looked)


def _write(
    output: Path, new: ParticleSet, found: Assigned, confidence: Float[Tensor, " n"], searched: Bool[Tensor, " n"]
) -> None:
    values = {
        "confidence": confidence,
        "rotation_sd": torch.rad2deg(found.spread[:, 0]),
        "shift_sd": found.spread[:, 1] * new.pixel_size,
        "scale": found.strength,
    }
    columns = {PARTICLE_COLUMNS[name]: [f"{x:.4f}" for x in column.tolist()] for name, column in values.items()}
    columns[PARTICLE_COLUMNS["searched"]] = [str(int(x)) for x in searched]
    write_particles(
        output / "particles.star",
        new,
        rotations=found.rotations.to(torch.float64).numpy(),
        shifts=(found.shifts * new.pixel_size).to(torch.float64).numpy(),
        extra=columns,
        relative_to=outputs.project_folder(output),
    )
